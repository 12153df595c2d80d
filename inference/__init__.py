"""A trained model at work: loading it, generating answers, scoring and evaluating them."""
