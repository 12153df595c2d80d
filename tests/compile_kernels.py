"""Compile the fused kernels for a GPU that need not be there:   python tests/compile_kernels.py 80|90

One line for each kernel: its name and the shared memory it takes. Needs triton.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft import kernels
from peft.fused import Shape

TYPES = {"T": "i32", "BYTES": "i32", "seed": "i32", "scale": "fp32", "bits_p": "*u8"}
FLOAT32 = ("W_p", "A_p", "gate_p", "dgate_p", "parts_p")
SHAPE = Shape(in_features=4096, experts=8, trained_experts=8, rank=4, shares_A=False, top_k=2, dropped=3277)
CONSTANTS = SHAPE.constants() | {"TOP_K": SHAPE.top_k, "DROPPED": SHAPE.dropped, "FROM_OUTSIDE": True}
KERNELS = {
    kernels._features: (kernels.FEATURES, {"SPAN": 1024}),
    kernels._sum_features: (kernels.THIN, {"SPLITS": 4}),
    kernels._thin_gradients: (kernels.THIN, {}),
    kernels._add_to_input: (kernels.INPUT, {}),
    kernels._weight_gradients: (kernels.WEIGHTS, {"SPAN": 1024}),
}


def compiled(kernel, sizes: kernels.Sizes, constants: dict[str, int], architecture: int):
    """As for bf16 and a float32 adapter, all tensors at multiples of 16 bytes."""
    names = kernel.arg_names
    constants = CONSTANTS | {"ROWS": sizes.rows, "COLUMNS": sizes.columns} | constants
    types = {name: TYPES.get(name, "*fp32" if name in FLOAT32 else "*bf16") for name in names}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else kind for name, kind in types.items()},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name.endswith("_p")},
    )
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


if __name__ == "__main__":
    for kernel, (sizes, constants) in KERNELS.items():
        result = compiled(kernel, sizes, constants, int(sys.argv[1]))
        print(kernel.__name__, result.metadata.shared)
