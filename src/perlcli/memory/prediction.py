"""What a stage will hold in memory at its highest, from the model's config alone, and the largest batch that fits."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from perlcli import settings
from perlcli.arms import Arm
from perlcli.errors import PerlError
from perlcli.memory import trace
from perlcli.memory.trace import CACHE, GRADIENTS, Step

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK, NESTED, CODE = (
    64,
    256,
    256,
)  # of bitsandbytes' NF4: values a scale, scales a scale of scales, entries of its code
NF4 = 16
CUDA_WORKSPACE = 40 << 20  # cuBLAS and cuBLASLt take it from torch's allocator (Hopper: 32 MiB and some)
CUDA_CONTEXT, SPARE = 600 << 20, 0.05  # beside torch's allocator: the driver's own, and what fragments stay unused
MOST = 65536  # rows that a batch is tried up to


@dataclass(frozen=True)
class Shape:
    """A model's parameters in groups, and its config."""

    name: str
    linear: tuple[tuple[int, int], ...]  # (out, in) of each weight that bitsandbytes would quantise
    rest: int  # parameters of embeddings, norms, biases
    head: int  # parameters of the output head that are not the embeddings'
    hidden: int
    largest: int  # parameters of the largest tensor
    stored: str  # the dtype of the files, as the config tells
    config: Any = field(compare=False, repr=False)
    trust_remote_code: bool = False

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(out * width for out, width in self.linear) + self.rest + self.head


@dataclass(frozen=True)
class Plan:
    """What is to be trained, and how."""

    stage: settings.Use
    arm: Arm
    targets: tuple[str, ...] | str = ()
    dtype: str = "float32"  # of the base as it is loaded
    batch: int = 8  # per device: rows, pairs or completions
    length: int = 1024  # tokens a row, prompt and completion together
    completion: int = 128
    accumulation: int = 1  # passes a step: rl samples for all of them at once
    checkpointing: bool = False
    reinforce: bool = False
    rewards: int = 1
    anchor: bool = False  # rl starts from an adapter, of which the anchor is a copy
    one_base: bool = True  # else each role has a copy of its own, as in stock TRL
    cuda: bool = False


@dataclass(frozen=True)
class Phase:
    """The bytes that are held at the highest point of a phase, by what they are for."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """What a plan takes, in bytes."""

    weights: dict[str, int]  # frozen or base weights by role
    adapters: dict[str, int]  # by role, heads of scores among them
    gradients: int
    optimiser: int
    phases: tuple[Phase, ...]

    @property
    def highest(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.highest.total


def shape_of(config: Any, name: str = "", *, trust_remote_code: bool = False) -> Shape:
    """The shape of the model of this config, from its modules without weights; raises PerlError for no causal LM."""
    try:
        model = trace.skeleton(config, Step("sft", 2), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library's, or remote code's own
        problem = f"{name or config.model_type} can't be built as a causal language model: {type(error).__name__}"
        raise PerlError(problem, "name a causal language model") from error
    if trace.has_experts(model):
        problem = f"{name or config.model_type} sends tokens to experts by what they say: its memory depends on data"
        raise PerlError(problem, "a step of a real run tells its peak: perl reward … --max-steps 2")
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    sizes = {id(p): p.numel() for p in model.parameters()}
    tied = head is None or head.weight is model.get_input_embeddings().weight
    of_head = 0 if tied else sum(p.numel() for p in head.parameters())
    shapes = tuple(_out_in(module) for module in linear)
    rest = sum(sizes.values()) - sum(out * width for out, width in shapes) - of_head
    text = config.get_text_config()
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return Shape(
        name, shapes, rest, of_head, int(text.hidden_size), max(sizes.values()), stored, copy.deepcopy(config),
        trust_remote_code,
    )  # fmt: skip


def _out_in(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (int(columns), int(rows)) if isinstance(module, Conv1D) else (int(rows), int(columns))


def weight_bytes(shape: Shape, bits: int, dtype: str, *, head: bool = True) -> int:
    """A base's bytes: the linear modules in `bits` with their scales, the rest in `dtype`; a score has no head."""
    rest = (shape.rest + (shape.head if head else 0)) * SIZES[dtype]
    if not bits:
        return rest + sum(out * width for out, width in shape.linear) * SIZES[dtype]
    return rest + sum((_four_bits if bits == 4 else _eight_bits)(out, width) for out, width in shape.linear)


def _four_bits(out: int, width: int) -> int:
    """NF4 with double quantisation (model/loading.py): packed values, a byte per block, their scales and two codes."""
    blocks = math.ceil(out * width / BLOCK)
    return math.ceil(out * width / 2) + blocks + 4 * (math.ceil(blocks / NESTED) + CODE + NF4 + 1)


def _eight_bits(out: int, width: int) -> int:
    """LLM.int8: a byte a value, and a float32 scale a row."""
    return out * width + 4 * out


def adapter_parameters(shape: Shape, plan: Plan, stage: settings.Use) -> int:
    """What one adapter trains: LoRA's two matrices (and DoRA's magnitudes) on each target, and a score's head."""
    kind: trace.Kind = "reward" if stage == "reward" else "sft"
    return _trainable(shape, Step(kind, 2, rank=plan.arm.rank or 0, targets=plan.targets, dora=plan.arm.is_dora))


@functools.cache
def _trainable(shape: Shape, step: Step) -> int:
    short = trace.shortened_once(shape.config)
    model = trace.skeleton(short, step, trust_remote_code=shape.trust_remote_code)
    layers = trace.layers_of(model.get_base_model())
    more = int(shape.config.get_text_config().num_hidden_layers) - len(layers)
    return _count(model) + (more * _count(layers[0]) if more and layers else 0)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def predict(shape: Shape, plan: Plan) -> Prediction:
    """What this plan holds: what lies there, and the highest point of each of its phases."""
    weights, adapters = _weights(shape, plan), _adapters(shape, plan)
    trained = _trained(shape, plan)
    optimiser, gradients = 8 * trained, 4 * trained  # AdamW's two moments and the gradients, all float32
    lying = {"weights": sum(weights.values()), "adapters": sum(adapters.values())}
    lying["overhead"] = CUDA_WORKSPACE if plan.cuda else 0
    states = lying | {"optimiser": optimiser}
    of_one = 4 * _trained(shape, replace(plan, reinforce=False))
    phases = [Phase("loading", lying | {"activations": _loading(shape, plan)})]
    for each in _passes(plan):
        held = trace.trace(shape.config, each.step, trust_remote_code=shape.trust_remote_code).at_peak(each.rows)
        held[GRADIENTS] += each.adapters * of_one
        phases.append(Phase(each.name, states | held))
    phases.append(Phase("update", states | {GRADIENTS: gradients}))
    return Prediction(weights, adapters, gradients, optimiser, tuple(phases))


def _weights(shape: Shape, plan: Plan) -> dict[str, int]:
    """The bytes of whole models by role; full tuning holds what it trains in float32, and its anchor as well."""
    arm, is_reward = plan.arm, plan.stage == "reward"
    if arm.is_full:
        found = {
            "policy": weight_bytes(shape, 0, "float32", head=not is_reward) + (4 * shape.hidden if is_reward else 0)
        }
        if plan.stage == "rl":
            found["anchor"] = weight_bytes(shape, 0, "float32")
            found |= _rewards(plan, weight_bytes(shape, 0, plan.dtype, head=False) + shape.hidden * SIZES[plan.dtype])
        return found
    base = weight_bytes(shape, arm.bits, plan.dtype, head=not is_reward)
    if is_reward:  # peft keeps the head as it was beside the one that it trains
        return {"base": base + shape.hidden * SIZES[plan.dtype]}
    if plan.stage == "sft" or plan.one_base:
        return {"base": base}
    second = weight_bytes(shape, arm.bits, plan.dtype, head=False)
    copies = {"policy": base, **_rewards(plan, second)}
    return copies | ({"value": second} if plan.reinforce else {})


def _rewards(plan: Plan, size: int) -> dict[str, int]:
    return {"reward" if number == 0 else f"reward {number + 1}": size for number in range(plan.rewards)}


def _adapters(shape: Shape, plan: Plan) -> dict[str, int]:
    """The bytes of adapters by role, float32; the head of a reward that only scores is in the base's dtype."""
    if plan.arm.is_full:
        return {}
    own = 4 * adapter_parameters(shape, plan, plan.stage)
    if plan.stage != "rl":
        return {"policy": own}
    found = {"policy": own} | ({"anchor": own} if plan.anchor else {})
    found |= _rewards(plan, own + shape.hidden * SIZES[plan.dtype])
    return found | ({"value": own + 4 * (shape.hidden + 1)} if plan.reinforce else {})


def _trained(shape: Shape, plan: Plan) -> int:
    """How many parameters get gradients and moments."""
    if plan.arm.is_full:
        return shape.parameters - (shape.head - shape.hidden if plan.stage == "reward" else 0)
    own = adapter_parameters(shape, plan, plan.stage)
    return 2 * own + shape.hidden + 1 if plan.stage == "rl" and plan.reinforce else own


def _loading(shape: Shape, plan: Plan) -> int:
    """What loading takes for the moment: the largest tensor as stored; on a CPU the file, until it is converted."""
    size = SIZES.get(shape.stored, 4)
    is_converted = shape.stored != ("float32" if plan.arm.is_full else plan.dtype) or plan.arm.bits
    if plan.cuda or not is_converted:
        return shape.largest * size
    return shape.parameters * size


@dataclass(frozen=True)
class Pass:
    """A phase that runs the model."""

    name: str
    step: Step
    rows: int  # that go through at once
    adapters: int = 0  # whose gradients lie there already


def _passes(plan: Plan) -> list[Pass]:
    """The phases that run the model, in their order.

    Scoring and the anchor's log-probabilities are left out: they take the rows of learning forward, and keep nothing.
    """
    arm, mixed = plan.arm, plan.dtype if plan.dtype != "float32" else ""
    held, again = "float32" if arm.is_full else plan.dtype, int(plan.accumulation > 1)
    step = Step(
        plan.stage, plan.length, plan.completion, dtype=held, autocast=mixed, bits=arm.bits, rank=arm.rank or 0,
        targets=plan.targets, dora=arm.is_dora, checkpointing=plan.checkpointing, accumulated=bool(again),
        cuda=plan.cuda,
    )  # fmt: skip
    if plan.stage != "rl":
        step = replace(step, completion=0)
        return [Pass("learning", step, plan.batch * (2 if plan.stage == "reward" else 1), again)]
    # An adapter is sampled outside autocast; a whole model's own forward pass has it on.
    sampled = replace(step, checkpointing=False, accumulated=False, completion=0, autocast=mixed if arm.is_full else "")
    rows = plan.batch * plan.accumulation
    found = [
        Pass("sampling", replace(sampled, kind="prefill", length=max(2, plan.length - plan.completion)), rows),
        Pass("sampling", replace(sampled, kind="decode"), rows),
        Pass("learning", step, plan.batch, again),
    ]
    if plan.reinforce:  # the value model learns when the policy's gradients are whole
        found.append(Pass("value", replace(step, kind="value"), plan.batch, 1 + again))
    return found


def takes(prediction: Prediction, plan: Plan) -> int:
    """What a device must have for this: on a GPU the driver's own share and unused fragments come on top."""
    return int(prediction.peak * (1 + SPARE)) + CUDA_CONTEXT if plan.cuda else prediction.peak


def largest_batch(shape: Shape, plan: Plan, limit: int) -> int:
    """The most rows per device that fit into so many bytes; 0 where not even one does."""

    def fits(batch: int) -> bool:
        tried = replace(plan, batch=batch)
        return takes(predict(shape, tried), tried) <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cache_bytes(prediction: Prediction) -> int:
    """The keys and values that sampling holds at its highest."""
    return max((phase.parts.get(CACHE, 0) for phase in prediction.phases), default=0)


def device_bytes() -> int | None:
    """The memory of the GPU at hand; None without one."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
