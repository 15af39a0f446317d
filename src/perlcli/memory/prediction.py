"""The peak memory of a stage, predicted from the model's config, and the largest batch that fits."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from perlcli import device, settings
from perlcli.arms import Arm
from perlcli.errors import PerlError
from perlcli.memory import optimisers, skeletons, trace
from perlcli.memory.optimisers import Tensors
from perlcli.memory.skeletons import Kind, Step
from perlcli.memory.tracking import GRADIENTS
from perlcli.model import heads
from perlcli.model.target_modules import experts
from perlcli.text import size

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK, NESTED, CODE = 64, 256, 256  # bitsandbytes' NF4: values per scale, scales per second scale, code's entries
NF4 = 16
# cuBLAS and cuBLASLt share a workspace of torch's allocator, for each thread that multiplies: the forward and the
# backward pass have one each. By compute capability: torch 2.11, aten/src/ATen/cuda/CublasHandlePool.cpp.
THREADS, WORKSPACE, LARGE_WORKSPACE, LARGE_FROM = 2, 8320 << 10, 32 << 20, 9
CUDA_CONTEXT, SPARE = 600 << 20, 0.05  # outside torch's allocator: the driver's own, and unused fragments
MOST = 65536  # rows of the largest batch that is tried


@dataclass(frozen=True)
class Shape:
    """A model's parameters in groups, and its config."""

    name: str
    linear: tuple[tuple[int, int], ...]  # (out, in) of each weight that bitsandbytes would quantise
    rest: int  # parameters of embeddings, norms, biases
    head: int  # parameters of the output head that are not the embeddings', where a reward model leaves it out
    hidden: int
    largest: int  # parameters of the largest tensor
    stored: str  # the dtype of the files, by the config
    experts: int  # parameters of experts, which are in no linear module
    config: PreTrainedConfig = field(compare=False, repr=False)
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
    length: int = 1024  # tokens per row, prompt and completion together
    completion: int = 128
    group: int = 1  # completions of a pass that share their prompt
    accumulation: int = 1  # passes per step; rl samples for all of them at once
    checkpointing: bool | None = False  # None: only where it doesn't fit without (`settled`)
    reentrant: bool = False  # how checkpointing is done
    optim: str = optimisers.DEFAULT
    reinforce: bool = False
    rewards: int = 1
    anchor: bool = False  # rl starts from an adapter, and the anchor is a copy of it
    one_base: bool = True  # else each role has its own copy, as in stock TRL
    cuda: bool = False


@dataclass(frozen=True)
class Phase:
    """The bytes that are held at the peak of a phase, by what they are for."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """What a plan takes, in bytes."""

    weights: dict[str, int]  # frozen or base weights by role
    adapters: dict[str, int]  # by role, including the heads of reward and value models
    gradients: int
    optimiser: int
    paged: int  # of the optimiser's, in memory that the driver moves to the host's: in no phase
    phases: tuple[Phase, ...]  # the first is loading

    @property
    def highest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.highest.total

    @property
    def loading(self) -> int:
        """The peak until training begins."""
        return self.phases[0].total

    @property
    def training(self) -> int:
        """The peak from then on."""
        return max(phase.total for phase in self.phases[1:])


def shape_of(config: PreTrainedConfig, name: str = "", *, trust_remote_code: bool = False) -> Shape:
    """The shape of the model of this config, from its modules without weights. Raises PerlError for anything but a
    causal language model."""
    try:
        model = skeletons.bare(config, Step("sft", 2), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library's, or remote code's own
        problem = f"{name or config.model_type} can't be built as a causal language model: {type(error).__name__}"
        raise PerlError(problem, "name a causal language model") from error
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if skeletons.is_quantisable(m) and m is not head]
    sizes = [p.numel() for p in model.parameters()]  # tied ones once
    tied = head is None or head.weight is model.get_input_embeddings().weight
    stays = heads.needs_causal(config, trust_remote_code=trust_remote_code)  # a reward's head is next to it
    of_head = 0 if tied or stays else sum(p.numel() for p in head.parameters())
    return Shape(
        name=name,
        linear=tuple(_out_in(module) for module in linear),
        rest=sum(sizes) - sum(module.weight.numel() for module in linear) - of_head,
        head=of_head,
        hidden=int(config.get_text_config().hidden_size),
        largest=max(sizes),
        experts=_in_experts(model),
        stored=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        config=copy.deepcopy(config),
        trust_remote_code=trust_remote_code,
    )


def _in_experts(model: nn.Module) -> int:
    ends = experts(model)
    return sum(p.numel() for name, p in model.named_parameters() if any(f".{name}".endswith(f".{end}") for end in ends))


def _out_in(module: nn.Linear | Conv1D) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (int(columns), int(rows)) if isinstance(module, Conv1D) else (int(rows), int(columns))


def held(shape: Shape, bits: int, dtype: str, *, head: bool = True) -> tuple[int, int]:
    """The bytes of a quantised base that are in `bits` bits, and those that stay in `dtype`: bitsandbytes quantises the
    linear modules only, and neither embeddings nor the experts of a mixture."""
    rest = (shape.rest + (shape.head if head else 0)) * SIZES[dtype]
    return weight_bytes(shape, bits, dtype, head=head) - rest, rest


def held_line(shape: Shape, bits: int, dtype: str, *, head: bool = True) -> str:
    """The same in words."""
    inside, rest = held(shape, bits, dtype, head=head)
    line = f"Of the base, {size(inside)} are in {bits} bits and {size(rest)} stay in {dtype}"
    of_experts = f", as bitsandbytes leaves out experts ({size(shape.experts * SIZES[dtype])})" if shape.experts else ""
    return f"{line}{of_experts}."


def weight_bytes(shape: Shape, bits: int, dtype: str, *, head: bool = True) -> int:
    """A base's bytes: the linear modules in `bits` with their scales, the rest in `dtype`. `bits` is 0 unless
    quantised; a reward or value model has no output head."""
    rest = (shape.rest + (shape.head if head else 0)) * SIZES[dtype]
    if bits == 4:
        return rest + sum(_four_bits(out * width) for out, width in shape.linear)
    if bits == 8:  # LLM.int8: a byte per value, and a float32 scale per row
        return rest + sum(out * width + 4 * out for out, width in shape.linear)
    return rest + sum(out * width for out, width in shape.linear) * SIZES[dtype]


def _four_bits(values: int) -> int:
    """NF4 with double quantisation (model/loading.py): packed values, a byte per block, their scales and two codes."""
    blocks = math.ceil(values / BLOCK)
    return math.ceil(values / 2) + blocks + 4 * (math.ceil(blocks / NESTED) + CODE + NF4 + 1)


def _adapter_parameters(shape: Shape, plan: Plan) -> int:
    """Parameters of one adapter: LoRA's two matrices (and DoRA's magnitudes) on each target, and a reward's head."""
    return sum(each.number * each.size for each in _trained_by(shape, _training_step(plan)))


def _training_step(plan: Plan) -> Step:
    kind: Kind = "reward" if plan.stage == "reward" else "sft"
    return Step(kind, 2, rank=plan.arm.rank or 0, targets=plan.targets, dora=plan.arm.is_dora)


@functools.cache
def _trained_by(shape: Shape, step: Step) -> tuple[Tensors, ...]:
    """The tensors that a model of this shape trains."""
    short = skeletons.shortened(shape.config)
    base = skeletons.bare(short, step, trust_remote_code=shape.trust_remote_code)
    model = skeletons.with_adapter(base, step)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = skeletons.layers_of(base)
    more = int(shape.config.get_text_config().num_hidden_layers) - len(layers)
    counts: Counter[tuple[tuple[int, ...], bool]] = Counter()
    for part, times in ((model, 1), *([(layers[0], more)] if more and layers else [])):
        for parameter in part.parameters():
            if parameter.requires_grad:
                counts[tuple(parameter.shape), id(parameter) in embeddings] += times
    return tuple(Tensors(size, count, is_embedding) for (size, is_embedding), count in counts.items())


def predict(shape: Shape, plan: Plan) -> Prediction:
    """What this plan holds throughout, and at the peak of each of its phases."""
    weights, adapters = _weights(shape, plan), _adapters(shape, plan)
    trained = _trained(shape, plan)
    optimiser = optimisers.states(plan.optim, trained, cuda=plan.cuda)
    gradients = _gradients(trained)
    constant = {"weights": sum(weights.values()), "adapters": sum(adapters.values())}
    states = constant | {"overhead": workspace() if plan.cuda else 0, "optimiser": optimiser.resident}
    of_one = _gradients(_trained(shape, replace(plan, reinforce=False)))
    phases = [Phase("loading", constant | {"activations": _loading(shape, plan)})]
    for each in _passes(plan):
        held = trace.trace(shape.config, each.step, trust_remote_code=shape.trust_remote_code).at_peak(each.rows)
        held[GRADIENTS] += each.adapters * of_one
        phases.append(Phase(each.name, states | held))
    phases.append(Phase("update", states | {GRADIENTS: gradients, "activations": optimiser.momentary}))
    return Prediction(weights, adapters, gradients, optimiser.resident, optimiser.paged, tuple(phases))


def _gradients(trained: Sequence[Tensors]) -> int:
    return sum(4 * each.number * each.size for each in trained)  # in float32


def workspace() -> int:
    """The bytes that cuBLAS takes on this machine's GPU; without one, on the newest that are known."""
    is_large = device.kind() != "cuda" or torch.cuda.get_device_capability()[0] >= LARGE_FROM
    return THREADS * (LARGE_WORKSPACE if is_large else WORKSPACE)


def _weights(shape: Shape, plan: Plan) -> dict[str, int]:
    """The bytes of complete models by role; full tuning holds the model and its anchor in float32."""
    arm, is_reward, of_head = plan.arm, plan.stage == "reward", shape.hidden * SIZES[plan.dtype]
    if arm.is_full:
        policy = weight_bytes(shape, 0, "float32", head=not is_reward) + (4 * shape.hidden if is_reward else 0)
        if plan.stage != "rl":
            return {"policy": policy}
        rewards = _rewards(plan, weight_bytes(shape, 0, plan.dtype, head=False) + of_head)
        return {"policy": policy, "anchor": policy, **rewards}
    base = weight_bytes(shape, arm.bits, plan.dtype, head=not is_reward)
    if is_reward:  # peft keeps the original head next to the one that it trains
        return {"base": base + of_head}
    if plan.stage == "sft" or plan.one_base:
        return {"base": base}
    second = weight_bytes(shape, arm.bits, plan.dtype, head=False)
    copies = {"policy": base, **_rewards(plan, second)}
    return copies | ({"value": second} if plan.reinforce else {})


def _rewards(plan: Plan, size: int) -> dict[str, int]:
    return {"reward" if number == 0 else f"reward {number + 1}": size for number in range(plan.rewards)}


def _adapters(shape: Shape, plan: Plan) -> dict[str, int]:
    """The bytes of adapters by role, in float32, heads included."""
    if plan.arm.is_full:
        return {}
    own = 4 * _adapter_parameters(shape, plan)
    if plan.stage != "rl":
        return {"policy": own}
    sizes = {"policy": own} | ({"anchor": own} if plan.anchor else {})
    sizes |= _rewards(plan, own + 4 * shape.hidden)
    return sizes | ({"value": own + 4 * (shape.hidden + 1)} if plan.reinforce else {})


def _trained(shape: Shape, plan: Plan) -> tuple[Tensors, ...]:
    """The tensors that a run trains; the value model of REINFORCE has the policy's modules, and a head with a bias."""
    own = _trained_by(shape, _training_step(plan))
    is_reinforce = plan.stage == "rl" and plan.reinforce
    return (*own, *own, Tensors((1, shape.hidden)), Tensors((1,))) if is_reinforce else own


def _loading(shape: Shape, plan: Plan) -> int:
    """What loading takes temporarily. On a GPU the largest tensor as stored, if it is converted or quantised there:
    else it is loaded into place. On a CPU the file, until it is converted."""
    is_converted = shape.stored != ("float32" if plan.arm.is_full else plan.dtype) or plan.arm.bits
    if plan.cuda and not is_converted:
        return 0
    is_read_at_once = is_converted and not plan.cuda
    return (shape.parameters if is_read_at_once else shape.largest) * SIZES.get(shape.stored, 4)


@dataclass(frozen=True)
class Pass:
    """A phase that runs the model."""

    name: str
    step: Step
    rows: int  # that go through at once
    adapters: int = 0  # whose gradients exist already


def _passes(plan: Plan) -> list[Pass]:
    """The phases that run the model, in order. Scoring and the anchor's log-probabilities are left out: they run the
    rows of learning forward, and keep nothing."""
    arm, mixed = plan.arm, plan.dtype if plan.dtype != "float32" else ""
    held, again = "float32" if arm.is_full else plan.dtype, int(plan.accumulation > 1)
    step = Step(
        kind=plan.stage,
        length=plan.length,
        # off the GPU, TRL's output layer multiplies prompts too, which ours leaves out (training/logits.py)
        completion=plan.completion if plan.one_base or plan.cuda else plan.length - 1,
        # checkpointing turns the cache off, and one completion per prompt shares nothing
        group=plan.group if plan.stage == "rl" and not plan.checkpointing and plan.length > plan.completion else 1,
        dtype=held,
        autocast=mixed,
        bits=arm.bits,
        rank=arm.rank or 0,
        targets=plan.targets,
        dora=arm.is_dora,
        checkpointing=bool(plan.checkpointing),
        reentrant=plan.reentrant,
        accumulated=bool(again),
        cuda=plan.cuda,
    )
    if plan.stage != "rl":
        step = replace(step, completion=0)
        return [Pass("learning", step, plan.batch * (2 if plan.stage == "reward" else 1), again)]
    # An adapter is sampled outside autocast; under full tuning the model's forward pass has it on.
    sampled = replace(
        step, checkpointing=False, accumulated=False, completion=0, group=1, autocast=mixed if arm.is_full else ""
    )
    rows = plan.batch * plan.accumulation
    prompts = math.ceil(rows / plan.group)
    passes = [
        Pass("sampling", replace(sampled, kind="prefill", length=max(2, plan.length - plan.completion)), prompts),
        Pass("sampling", replace(sampled, kind="decode"), rows),
        Pass("learning", step, plan.batch, again),
    ]
    if plan.reinforce:  # the value model learns when the policy's gradients are complete
        passes.append(Pass("value", replace(step, kind="value", group=1), plan.batch, 1 + again))
    return passes


def takes(prediction: Prediction, plan: Plan) -> int:
    """The bytes that a device needs for this: on a GPU, also the driver's share and unused fragments."""
    return int(prediction.peak * (1 + SPARE)) + CUDA_CONTEXT if plan.cuda else prediction.peak


def settled(shape: Shape, plan: Plan, limit: int | None) -> Plan:
    """The plan with gradient checkpointing decided: on a GPU on, unless the plan fits into `limit` bytes without."""
    if plan.checkpointing is not None:
        return plan
    without = replace(plan, checkpointing=False)
    if not plan.cuda or (limit is not None and takes(predict(shape, without), without) <= limit):
        return without
    return replace(plan, checkpointing=True)


def largest_batch(shape: Shape, plan: Plan, limit: int) -> int:
    """The most rows per device that fit into so many bytes; 0 if not even one does."""
    plan = replace(plan, checkpointing=True) if plan.checkpointing is None and plan.cuda else plan

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


def device_bytes() -> int | None:
    """The memory of this machine's GPU; None without one."""
    return int(torch.cuda.mem_get_info()[1]) if device.kind() == "cuda" else None


def free_bytes() -> int | None:
    """The memory that is free on this machine's GPU; None without one."""
    if device.kind() != "cuda":
        return None
    torch.cuda.empty_cache()  # what an earlier run in this process left behind
    return int(torch.cuda.mem_get_info()[0])
