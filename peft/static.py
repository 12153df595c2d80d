"""Mixtures without their router: plain LoRAs that replace one adapted Linear.

A router depends on its input, so no plain LoRA equals a mixture. For fixed weights g, however, the mixture *is* one:

    (alpha/r) * sum_n g_n B_n A_n  =  (alpha/r) * [g_1 B_1 ... g_N B_N] A            rank N*r

Shape suffixes: B samples, T tokens, N tokens in a row, E experts, R rank of one expert, S = E*R stacked rank,
I / O input and output features, K rank of the result.
"""

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import LoraExperts, LoraLayer


def stacked_a(experts: LoraExperts) -> Tensor:
    """A of all experts, (S, I), detached; repeated where they share one."""
    A = experts.lora_A.detach()
    return A.repeat(experts.num_experts, 1) if len(A) == experts.rank else A


def static_lora(experts: LoraExperts, weights_E: Tensor) -> tuple[Tensor, Tensor]:
    """The LoRA that equals the mixture with fixed weights, of rank E*R and with the experts' own scaling.

    Args:
        weights_E: the weight of each trained expert.

    Returns:
        A of shape (S, I) and B of shape (O, S), float32.
    """
    weights_S = weights_E.to(experts.lora_B).repeat_interleave(experts.rank)
    return stacked_a(experts).clone(), experts.lora_B.detach() * weights_S


class Calibration:
    """Context manager that collects, while rows pass through the model, what a static LoRA is fitted to.

    Args:
        experts: the active experts of each adapted Linear, by name.

    Attributes:
        mask_BT: 1 for the tokens that count; to be set before each forward pass.
    """

    mask_BT: Tensor

    def __init__(self, experts: dict[str, LoraExperts]):
        self._experts = experts
        self._sums: dict[str, list[Tensor]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "Calibration":
        for name, module in self._experts.items():
            self._hooks.enter_context(module.register_forward_pre_hook(self._collect(name)))
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.close()

    def mean_weights(self, name: str) -> Tensor:
        """Mean weight (E,) of each trained expert of a Linear over the tokens."""
        weights_E, _, _ = self._sums[name]
        return (weights_E / weights_E.sum())[: self._experts[name].num_experts]

    def fitted_lora(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """The LoRA of a given rank that is closest to the mixture's output, in the mean square over the tokens.

        With h = A x and h' = repeat(w, R) * h, the mixture is B h' and static maps of the form B C h contain the one
        of any fixed weights. Least squares has C = E[h' h^T] E[h h^T]^-1, whatever B is. The best map of a lower rank
        keeps the leading left singular vectors of B C E[h h^T]^(1/2) (reduced-rank regression).

        Returns:
            A of shape (K, I) and B of shape (O, K), float32, K = `rank`, at most E*R.
        """
        experts = self._experts[name]
        _, hidden_SS, routed_SS = self._sums[name]
        eigenvalues_S, vectors_SS = torch.linalg.eigh(hidden_SS)
        roots_S = eigenvalues_S.clamp(min=eigenvalues_S[-1] * 1e-9).sqrt()
        C_SS = (routed_SS @ vectors_SS / roots_S.square()) @ vectors_SS.T
        Q_OS, R_SS = torch.linalg.qr(experts.lora_B.detach().double())
        left_SS, _, _ = torch.linalg.svd(R_SS @ C_SS @ vectors_SS * roots_S)
        left_SK = left_SS[:, :rank]
        A_KI = left_SK.T @ R_SS @ C_SS @ stacked_a(experts).double()
        # A Linear with fewer outputs than S has a map of lower rank: the rest is zeros.
        missing = rank - left_SK.shape[1]
        return F.pad(A_KI.float(), (0, 0, 0, missing)), F.pad((Q_OS @ left_SK).float(), (0, missing))

    def _collect(self, name: str):
        @torch.no_grad()
        def hook(experts: LoraExperts, inputs: tuple[Tensor]) -> None:
            counts_N = self.mask_BT.flatten().bool().to(inputs[0].device)
            x_NI = inputs[0].flatten(0, -2)[counts_N].to(experts.lora_A.dtype)
            weights_NE = (x_NI.new_ones(len(x_NI), 1) if experts.router is None else experts.router(x_NI)).double()
            hidden_NS = F.linear(x_NI, stacked_a(experts)).double()
            routed_NS = hidden_NS * weights_NE[:, : experts.num_experts].repeat_interleave(experts.rank, dim=1)
            sums = [weights_NE.sum(dim=0), hidden_NS.T @ hidden_NS, routed_NS.T @ hidden_NS]
            before = self._sums.get(name)
            self._sums[name] = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]

        return hook


def merged_linear(layer: LoraLayer, adapter_name: str) -> nn.Linear:
    """A plain Linear that computes what a wrapped one does with a plain LoRA: W0 + (alpha/r) B A, in W0's dtype.

    Raises:
        ValueError: the adapter has a router, so that it is not a matrix to add; or see `is_plain_product`.
    """
    experts, base = layer.experts[adapter_name], layer.base_layer
    if experts.router is not None:
        raise ValueError("a mixture has a router and cannot be merged")
    if not is_plain_product(base):
        raise ValueError(f"the weights of a {type(base).__name__} cannot be merged into")
    weight_OI = base.weight.float() + experts.scaling * (experts.lora_B @ experts.lora_A)
    merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter(weight_OI.to(base.weight.dtype), requires_grad=False)
    merged.bias = base.bias
    return merged


def is_plain_product(linear: nn.Module) -> bool:
    """True if a module is Wx + b: `nn.Linear`, or a subclass such as Falcon's that computes the same.

    Quantised Linears are not, nor is a Conv1D, which stores its weight transposed.
    """
    if type(linear) is nn.Linear:
        return True
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        return False
    weight = linear.weight
    x_BI = torch.linspace(-1, 1, 2 * linear.in_features, device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        return torch.allclose(linear(x_BI), nn.functional.linear(x_BI, weight, linear.bias), rtol=1e-2, atol=1e-3)
