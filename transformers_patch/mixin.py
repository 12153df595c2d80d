"""The mixin by which any causal language model of transformers knows task types and the balance term."""

import copy
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput, can_return_tuple

from peft import LoraConfig, LoraLayer, TrainedCopy, balance_coefficients, localized_balance_term
from peft.targets import GATED_MLP
from transformers_patch.labels import SupervisedTokens
from transformers_patch.recorder import RoutingRecorder


@dataclass
class LoRAMoEOutput(CausalLMOutputWithPast):
    """Output of a model with the mixin.

    Args:
        loss: what training minimises: LM loss plus weighted balance term (plus the base model's own router loss,
            weighted as its configuration says) while training, the LM loss alone in eval mode.
        lm_loss: next-token cross-entropy over the supervised tokens.
        balance_loss: the unweighted balance term; 0 with one expert or `blc_weight` 0, when it is not computed, and in
            eval mode with a mask that is not of shape (B, T).
        logits: of every position, (B, T, V), if no labels are given; with labels, only of the N positions whose next
            token is supervised, (1, N, V), in the order of the rows.
        aux_loss: the unweighted router loss of a base model that is a mixture of experts itself, if its
            configuration asks for it (`output_router_logits`); unrelated to the routers of the adapter.
        router_logits: of such a base model's own routers.
        routing_shares: while training, mean weight of each expert on this process's samples, (L, B, E), detached; None
            if nothing is routed.
    """

    lm_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing_shares: Tensor | None = None


_OUTPUT_FIELDS = {field.name for field in fields(LoRAMoEOutput)}


class LoRAMoEMixin:
    """Put before a `...ForCausalLM` class of transformers: `class X(LoRAMoEMixin, LlamaForCausalLM)`.

    The stock forward runs unchanged; only if labels are given is routing recorded around it and the output layer
    restricted to the supervised tokens, so generation and plain inference cost nothing extra and need no task types.
    """

    # The Linears that are adapted if a LoraConfig names none; `peft/targets.py` has those of other architectures.
    default_target_modules: tuple[str, ...] = GATED_MLP
    _balance_config: LoraConfig | None = None

    def configure_balance(self, config: LoraConfig | None) -> None:
        """Called by `peft` when an adapter becomes active; None if there is no adapter or it is disabled."""
        self._balance_config = config
        if config is not None:
            self._coefficients_KE = balance_coefficients(config.group_sizes, config.blc_alpha)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        task_types: Tensor | None = None,
        row_weights: Tensor | None = None,
        supervised_indices: Tensor | None = None,
        sample_ids: Tensor | None = None,
        balance_scale: float = 1.0,
        return_logits: bool = True,
        **kwargs,
    ) -> LoRAMoEOutput:
        """The stock forward without labels; with them, LM loss and balance term, and logits of supervised tokens only.

        Args:
            task_types: LongTensor of shape (B,): the samples' task types, -1 for none. None is -1 for all.
            row_weights: of shape (B,), from the `Collator`: 1 for an example, 0 for a padding example, which the term
                leaves out. None is 0 for rows whose mask is all 0; `task_types` are then checked, which synchronises
                with the device.
            supervised_indices: of shape (N,), from the `Collator`: positions in the flattened batch whose next token
                is supervised. None finds them, which synchronises with the device.
            sample_ids: of shape (B, T), if samples share rows (from the `PackingCollator`): the number of each token's
                sample, -1 for padding. `task_types` and `row_weights` are then those of the samples, and `position_ids`
                restart with each; there is no mask. None is a sample for each row.
            balance_scale: factor on the balance term (and on the base model's own router loss) in `loss`, by which a
                trainer makes the micro-batches of one optimizer step count as their mean. The reported terms lack it.
            return_logits: with labels, whether the output has the logits; they are large, and training needs none.

        The other arguments are those of the stock class.

        Raises:
            ValueError: the shape of `labels` or `task_types` does not fit the batch, a task type is out of range, the
                mask cannot tell padding from text, `logits_to_keep` is given with labels, which choose the positions
                themselves, or `sample_ids` with a mask or without positions and task types.
            RuntimeError: the adapter is frozen, or re-entrant checkpointing cut the routing off from its gradient.
        """
        if labels is None and hasattr(self, "router_aux_loss_coef"):
            # The base model's own router loss: stock forwards cannot compute it for a part of the mask, with a cache.
            kwargs.setdefault("output_router_logits", False)
        if sample_ids is not None:
            if attention_mask is not None or position_ids is None or task_types is None:
                raise ValueError("sample_ids need position_ids and task_types, and no attention_mask")
            use_cache = False  # with a cache, transformers would not look for samples in the positions
        stock_forward = partial(
            super().forward,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if labels is None:
            return LoRAMoEOutput(**_known(stock_forward()))
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            raise ValueError("logits_to_keep cannot be given with labels: logits are then those of supervised tokens")
        positions = SupervisedTokens(labels, supervised_indices)
        with RoutingRecorder(self) as recorder, positions.only(self, may_wait=not return_logits):
            outputs = stock_forward()
        loss = positions.loss(self, outputs.logits, **kwargs)
        kept = {name: value for name, value in _known(outputs).items() if return_logits or name != "logits"}
        output = LoRAMoEOutput(loss=loss, lm_loss=loss.clone(), **kept)  # Trainer scales `loss` in place
        if attention_mask is None:
            attention_mask = torch.ones_like(labels)
        elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, -labels.shape[1] :]  # with a cache, it covers what is in there as well
        self._add_balance(output, recorder, attention_mask, sample_ids, task_types, row_weights, balance_scale)
        if self.training and output.aux_loss is not None:
            output.loss = output.loss + self.router_aux_loss_coef * balance_scale * output.aux_loss
        return output

    def _add_balance(
        self,
        output: LoRAMoEOutput,
        recorder: RoutingRecorder,
        mask_BT: Tensor | dict,
        sample_ids_BT: Tensor | None,
        task_types_B: Tensor | None,
        row_weights_B: Tensor | None,
        balance_scale: float,
    ) -> None:
        """Put balance term and routing shares into the output and, while training, the weighted term into its loss."""
        assert output.lm_loss is not None
        output.balance_loss = output.lm_loss.new_zeros(())
        config = self._balance_config
        if config is None or config.routed_experts == 1 or not (self.training or config.balances):
            return
        if not isinstance(mask_BT, Tensor) or mask_BT.ndim != 2:
            if self.training and config.balances:
                found = tuple(mask_BT.shape) if isinstance(mask_BT, Tensor) else "not a tensor"
                raise ValueError(
                    "training with the balance term needs an attention_mask of shape (batch, length), which tells "
                    f"padding from text; this one is {found}"
                )
            return
        trains = self.training and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains and config.balances):
            real_BT: Tensor | None = mask_BT
            if sample_ids_BT is None:
                shares_LBE = recorder.sample_shares(mask_BT)
            else:
                assert task_types_B is not None
                shares_LBE, real_BT = recorder.packed_shares(sample_ids_BT, len(task_types_B)), None
            if config.balances:
                term = self._balance_term(recorder, shares_LBE, real_BT, task_types_B, row_weights_B, over_ranks=trains)
                output.balance_loss = term.to(output.loss.device)
        if self.training:
            output.routing_shares = shares_LBE.detach()
        if self.training and config.balances:
            output.loss = output.loss + config.blc_weight * balance_scale * output.balance_loss

    def _balance_term(
        self,
        recorder: RoutingRecorder,
        shares_LBE: Tensor,
        mask_BT: Tensor | None,
        task_types_B: Tensor | None = None,
        row_weights_B: Tensor | None = None,
        over_ranks: bool = False,
    ) -> Tensor:
        """The term of this micro-batch; with `over_ranks`, of the samples of all ranks together (a collective).

        With `blc_reference` it is the authors': of this rank's samples alone, with padding. They sum over the positions
        where a share is the mean: a factor, the length, which the term ignores.

        Args:
            mask_BT: 1 for real tokens, 0 for padding; None if samples share rows.
        """
        config, num_rows = self._balance_config, shares_LBE.shape[1]
        assert config is not None
        _refuse_detached(recorder)
        if config.blc_reference:
            if mask_BT is None:
                raise ValueError("blc_reference counts the padding of each sample, so samples cannot share rows")
            mask_BT, over_ranks = torch.ones_like(mask_BT), False
            shares_LBE = recorder.sample_shares(mask_BT)
        if task_types_B is None:
            task_types_B = torch.full((num_rows,), -1, device=shares_LBE.device)
        elif task_types_B.shape != (num_rows,):
            raise ValueError(f"task_types has shape {tuple(task_types_B.shape)}; this batch needs ({num_rows},)")
        elif row_weights_B is None:
            _check_task_types(task_types_B, config.num_task_types)
        if row_weights_B is None and mask_BT is not None:
            row_weights_B = mask_BT.any(dim=1)
        self._coefficients_KE = self._coefficients_KE.to(shares_LBE.device)
        coefficients_BE = self._coefficients_KE[task_types_B.to(shares_LBE.device)]
        return localized_balance_term(shares_LBE, coefficients_BE, row_weights_B, over_ranks)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As the stock class.

        Raises:
            ValueError: the adapter is on the embeddings or on the output layer and has their size.
        """
        ends = self.get_input_embeddings(), self.get_output_embeddings()
        if new_num_tokens is not None and any(isinstance(end, LoraLayer | TrainedCopy) for end in ends):
            raise ValueError(
                "the vocabulary cannot be resized under an adapter that has embed_tokens or lm_head: resize the base "
                "model first, then put the adapter on it"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save as the stock class, so that the folder (full fine-tuning, a merged model) loads anywhere.

        Raises:
            ValueError: an adapter is around its modules, whose weights would have other names.
        """
        if any(isinstance(module, LoraLayer | TrainedCopy) for module in self.modules()):
            raise ValueError("this base model has an adapter on it: save the PeftModel, which writes the adapter alone")
        # transformers saves settings that contradict each other (temperature without do_sample, in older chat
        # models) only as they were loaded, and a Trainer enters its special tokens.
        settings = self.generation_config
        settings._original_object_hash = hash(settings)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            stock = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("transformers."))
            config = copy.deepcopy(self.config)
            config.architectures = [stock.__name__]
            config.use_cache = True  # off while training
            config.save_pretrained(save_directory)


def _known(outputs: ModelOutput) -> dict:
    return {name: value for name, value in outputs.items() if name in _OUTPUT_FIELDS}


@torch.compiler.disable  # it depends on values, which a compiler would take for constants
def _check_task_types(task_types_B: Tensor, num_task_types: int) -> None:
    """Raises ValueError if a task type is out of range. Synchronises with the device."""
    for row, task_type in enumerate(task_types_B.tolist()):
        if not -1 <= task_type < num_task_types:
            raise ValueError(
                f"task_types has {task_type} in row {row}; allowed are 0 to {num_task_types - 1} and -1 for no type"
            )


def _refuse_detached(recorder: RoutingRecorder) -> None:
    """Routers that are frozen, or that re-entrant checkpointing runs without gradients, would silently stay
    unchanged."""
    if not torch.is_grad_enabled():
        return
    detached = [name for name, weights in recorder.weights.items() if not weights.requires_grad]
    if any(recorder.is_frozen(name) for name in detached):
        raise RuntimeError(
            "the adapter is frozen, so the balance term trains nothing: load it with is_trainable=True to train it, or "
            "use the model in eval mode"
        )
    if detached:
        raise RuntimeError(
            "the router weights carry no gradient, since re-entrant gradient checkpointing is on. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False} (the default)"
        )
