"""Using a trained model: loading it, generating answers, scoring and evaluating them."""
