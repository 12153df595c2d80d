"""Checks of optimizer and learning rate schedule: both are made for one parameter before anything is loaded."""

import argparse
import json

import torch
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames

# The supported optimizers, and what each reads from --optim_args.
OPTIMIZERS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    # From bitsandbytes.
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), ()),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), ()),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), ()),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    ),
}
WITHOUT_SETTINGS = ("constant", "constant_with_warmup")
# Schedules that follow a loss of the evaluations.
EVALUATED = ("reduce_lr_on_plateau", "greedy")
LEAST_RATES = {"reduce_lr_on_plateau": 0, "greedy": 1e-3}  # lower bound if min_lr is not given
STEPS = 1_000_000
# Raised by the libraries for unknown settings or values that are out of range.
REFUSALS = (TypeError, ValueError, ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError)


def optimizer_problems(flags: argparse.Namespace) -> list[str]:
    """One sentence for each reason why the optimizer cannot be made. Assumes that numbers are in range."""
    if flags.optim not in OPTIMIZERS:
        return [f"--optim {flags.optim} is not supported; supported are {', '.join(OPTIMIZERS)}"]
    known = OPTIMIZERS[flags.optim]
    pairs = [pair.strip().partition("=") for pair in (flags.optim_args or "").split(",") if pair.strip()]
    if flags.optim_args and (not pairs or any(name.strip() not in known or not value for name, _, value in pairs)):
        reads = f"reads {', '.join(f'{name}=VALUE' for name in known)}" if known else "does not read any"
        return [f"--optim_args is {flags.optim_args!r}, but --optim {flags.optim} {reads}"]
    settings = argparse.Namespace(**{**vars(flags), "optim": OptimizerNames(flags.optim)})
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(settings)
        kind([torch.nn.Parameter(torch.zeros(1))], **values)
    except REFUSALS as error:
        return [f"--optim {flags.optim} cannot be used: {error}"]
    return []


def schedule_problems(flags: argparse.Namespace) -> list[str]:
    """One sentence for each reason why the learning rate schedule cannot be used."""
    name, kinds = flags.lr_scheduler_type, [kind.value for kind in SchedulerType]
    if name not in kinds:
        return [f"--lr_scheduler_type is {name!r}; allowed are {', '.join(kinds)}"]
    try:
        settings = json.loads(flags.lr_scheduler_kwargs or "{}")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        return [f"--lr_scheduler_kwargs is {flags.lr_scheduler_kwargs!r}, but has to be a JSON object"]
    if settings and name in WITHOUT_SETTINGS:
        return [f"--lr_scheduler_kwargs: --lr_scheduler_type {name} does not read any"]
    if name in EVALUATED and flags.eval_strategy == "no":
        return [f"--lr_scheduler_type {name} needs an --eval_strategy"]
    if name in EVALUATED and settings.get("mode", "min") != "min":
        return ["--lr_scheduler_kwargs: mode has to be min, since a schedule follows a loss, of which less is better"]
    try:
        if name in EVALUATED and settings.get("min_lr", LEAST_RATES[name]) > flags.learning_rate:
            return [f"--lr_scheduler_kwargs: {name} needs a min_lr below --learning_rate {flags.learning_rate}"]
        rates = _rates(name, flags.learning_rate, settings)
    except REFUSALS as error:
        return [f"--lr_scheduler_type {name} cannot be used with --lr_scheduler_kwargs {json.dumps(settings)}: {error}"]
    if not all(0 <= rate <= flags.learning_rate * (1 + 1e-6) for rate in rates):
        found = f"--lr_scheduler_kwargs {json.dumps(settings)}" if settings else "without --lr_scheduler_kwargs"
        return [f"--lr_scheduler_type {name} {found} gives rates outside 0 to --learning_rate {flags.learning_rate}"]
    return []


def _rates(name: str, learning_rate: float, settings: dict) -> list[float]:
    """Learning rates at some steps; for schedules that depend on evaluations, after 100 without improvement."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = get_scheduler(name, optimizer, STEPS // 10, STEPS, settings)
    if name not in EVALUATED:
        (factor,) = schedule.lr_lambdas
        return [learning_rate * factor(STEPS * tenth // 10) for tenth in range(11)]
    for _ in range(100):
        schedule.step(1.0)
    return [group["lr"] for group in optimizer.param_groups]
