"""--dtype: matrix products of RL in bfloat16 or float16 (torch.autocast). The weights, what the
layers add up, softmax, norms, routers and rotary positions stay in fp32."""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from lab.options import option

DOUBLE_AFTER = 2000     # steps without overflow
COLUMNS = ("skipped",)


@dataclasses.dataclass
class Options:
    """precision"""
    dtype: str = option("float32", "of the matrix products in RL (torch.autocast)",
                        choices=("float32", "bfloat16", "float16"))


def wanted(config) -> bool:
    return config.dtype != "float32"


def norm_in_fp32(norm, inputs):
    return (inputs[0].to(norm.weight.dtype),)


def router_in_fp32(router, inputs, output):
    # Rounded logits are often equal, and then other experts win.
    with torch.autocast(output.device.type, enabled=False):
        return F.linear(inputs[0].to(router.weight.dtype), router.weight)


class Extra:
    """In float16, whose smallest number is 6e-8, gradients would vanish. So the loss is multiplied
    by a large number, and the gradients are divided by it. If one overflows, the step is skipped,
    and the next ones have a smaller number. (PyTorch's GradScaler would step and check by itself;
    here Trainer.optimizer_step does both.)"""
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = 2.0 ** 16 if self.config.dtype == "float16" else 1.0
        self.steps_at_scale = 0
        for module in self.model.modules():
            if isinstance(module, nn.RMSNorm):
                module.register_forward_pre_hook(norm_in_fp32)
        for layer in self.model.layers:
            layer.experts.router.register_forward_hook(router_in_fp32)

    def in_autocast(self, model):
        def forward(*inputs, **options):        # backward follows the types that it finds
            with torch.autocast(self.device.type, getattr(torch, self.config.dtype)):
                return model(*inputs, **options)
        return forward

    def collect(self, model, rng):
        own = getattr(self.config, "sampler", "same") == "same"     # else it has its own precision
        with torch.autocast(self.device.type, getattr(torch, self.config.dtype), enabled=own):
            return super().collect(model, rng)

    def score(self, model, *arguments):
        return super().score(self.in_autocast(model), *arguments)

    def gradient(self, model, batch, *arguments):
        batch.token_weights = batch.token_weights * self.scale      # in all terms of the loss
        learned = super().gradient(self.in_autocast(model), batch, *arguments)
        if learned:
            learned.loss /= self.scale
        return learned

    def optimizer_step(self, parameters, optimizers, max_grad_norm):
        if optimizers != [self.optimizer] or self.config.dtype != "float16":    # the cold start
            return super().optimizer_step(parameters, optimizers, max_grad_norm)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient /= self.scale
        self.steps_at_scale += 1
        self.measured.setdefault("skipped", 0.0)
        if not all(gradient.isfinite().all() for gradient in gradients):
            if self.scale < 1:
                raise FloatingPointError("gradients are not finite in float16; --dtype bfloat16 "
                                         "has a wider range")
            self.scale /= 2
            self.steps_at_scale = 0
            self.measured["skipped"] += 1
            return 0.0
        if self.steps_at_scale == DOUBLE_AFTER:
            self.scale *= 2
            self.steps_at_scale = 0
        return super().optimizer_step(parameters, optimizers, max_grad_norm)

    def state_dict(self):
        return super().state_dict() | {"loss_scale": [self.scale, self.steps_at_scale]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.scale, self.steps_at_scale = state["loss_scale"]
