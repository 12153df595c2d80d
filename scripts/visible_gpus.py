"""Print the number of visible GPUs and the half precision they train in: `2 bf16`, or `0 fp16` without any.

torch is asked, since it respects CUDA_VISIBLE_DEVICES. This is a separate process because asking for the precision
starts CUDA, which occupies memory of the first GPU until the process ends.
"""

import sys

import torch


def main() -> None:
    """Print one line, or exit with a message if CUDA does not start on the GPUs that there are."""
    gpus = torch.cuda.device_count()  # from the driver, which counts them even if CUDA does not start
    if gpus and not torch.cuda.is_available():
        sys.exit(
            f"error: there are GPUs ({gpus}), but CUDA does not start: see whether nvidia-smi shows a driver that is "
            f"too old for CUDA {torch.version.cuda}, which this torch is built for, and what CUDA_VISIBLE_DEVICES "
            "says; CUDA_VISIBLE_DEVICES= bash run_loramoe.sh trains on the CPU"
        )
    print(gpus, "bf16" if gpus and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")


if __name__ == "__main__":
    main()
