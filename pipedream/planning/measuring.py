"""What does a layer keep, send and compute? Run once on shapes without values.

A layer runs forward and backward on fake tensors: shapes, types and a graph, without values and
without memory. Bytes are those of storages that exist; FLOPs come from PyTorch's own table. CUDA's
kernels stand in where the CPU's keep something else, so the numbers are a GPU's. They agree with
real runs on the CPU, with formulas and with published counts; no GPU has confirmed them yet.

It uses private modules of PyTorch (tried: 2.13 and 2.14.1), as only processes/engine.py does, too.
"""

import contextlib
import copy
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipedream.backstage.storages import Storages
from pipedream_simple import UserError

aten, ATTENTION = torch.ops.aten, "_scaled_dot_product_flash_attention"
try:
    from torch._subclasses import fake_tensor as fakes
    from torch.utils.flop_counter import flop_registry

    FakeTensorMode = fakes.FakeTensorMode
    NO_VALUES = fakes.DataDependentOutputException, fakes.DynamicOutputShapeException
    FLASH, MATH = getattr(aten, ATTENTION), aten._scaled_dot_product_attention_math
    EFFICIENT, FLOPS = aten._scaled_dot_product_efficient_attention, dict[Any, Any](flop_registry)
    for way in ("", "_backward"):  # the table lacks the CPU's attention
        FLOPS[getattr(aten, f"{ATTENTION}_for_cpu{way}")] = FLOPS[getattr(aten, ATTENTION + way)]
    MISSING = ""
except (ImportError, AttributeError, KeyError) as error:
    MISSING = str(error).splitlines()[0]
UNCOUNTED = nn.RNNBase, nn.Bilinear  # not in the table either
PROFILE = "measure it with python -m pipedream profile"
NO_FLOPS = f"whose products PyTorch does not count: {PROFILE}"


class Measured(NamedTuple):
    """A layer, for one microbatch: numbers of parameters, bytes, and FLOPs (2 per multiply-add).

    The memory of input and output is kept if something needs it until the layer's backward. Peaks
    are of what the layer adds: its output and the gradients of output and input count; its input,
    weights and their gradients do not. (A weight's new gradient does, until it is added up.)
    """

    name: str  # of its class
    parameters: int
    tied: int  # of these, the ones that an earlier layer has too
    tied_to: int  # the number of that layer, or -1
    frozen: int  # of the parameters, those without a gradient
    input: int  # bytes that it is sent; a gradient of the same size goes back
    output: int
    in_place: bool  # its output lies in its input's memory
    input_kept: int  # 0 if it is not
    output_kept: int
    kept: int  # all other memory between its forward and its backward
    forward_peak: int
    backward_peak: int
    forward_flops: int  # of matrix products, convolutions and attention, causal or not
    input_flops: int  # I: of the gradient of its input
    weight_flops: int  # W: of the rest of its backward


class Activations(NamedTuple):
    """Bytes that a stage holds of one microbatch."""

    waiting: int  # from its forward to its backward
    whole: int  # during its backward, or from I until W
    working: int  # above that, at the peak of its forward and backward


def measure_layers(
    layers: Sequence[Callable[[], nn.Module]],
    x: Tensor | Callable[[], Tensor],
    dtype: torch.dtype | None = None,
    like_cuda: bool = True,
    fused_norms: bool = True,
) -> list[Measured]:
    """Measure layers in a row: the first one gets x, and each sends its output to the next.

    layers: functions that make a layer. One that comes again, with an input of the same shape and
    type, is measured once. dtype: of weights unless a layer sets its own, and of x if it is float.
    fused_norms=False: RMSNorm as Hugging Face's models write it in Python, not as one kernel.
    UserError: why a layer cannot be measured.
    """
    if MISSING:
        raise UserError(f"torch {torch.__version__} cannot measure ({MISSING}): take 2.13 or 2.14")
    rows, known = list[Measured](), dict[tuple, tuple]()
    counted: Any = weakref.WeakKeyDictionary()  # storage -> where a weight begins in it: its layer
    kernels: Any = LikeCUDA(fused_norms) if like_cuda else contextlib.nullcontext()
    with quietly(dtype):
        given, fake = x() if callable(x) else x, FakeTensorMode(allow_non_fake_inputs=True)
        if not isinstance(given, Tensor):
            raise UserError(f"the first layer gets a {type(given).__name__}; it takes one tensor")
        with fake:
            sent = stand_in(given, dtype)
        for number, make in enumerate(layers):
            key = id(make), sent.shape, sent.stride(), sent.dtype, sent.requires_grad
            if key not in known:
                known[key] = make_and_run(make, number, sent, fake, kernels, counted)
                rows.append(known[key][0])
            else:  # with new weights, unless something still has the first ones
                row, _, weights, device = known[key]
                with torch.device(device):
                    tied = count_weights(make(), counted, number)[1:3] if weights else (0, -1)
                rows.append(row._replace(tied=tied[0], tied_to=tied[1]))
            sent = known[key][1]
    return rows


def all_parameters(layers: Sequence[Measured]) -> int:
    """Of a network: tied ones count once."""
    return sum(layer.parameters - layer.tied for layer in layers)


def activations_in_stage(layers: Sequence[Measured], recompute: str = "none") -> Activations:
    """What a stage of these layers holds. Its input counts; its output if a layer needs it.

    recompute: "none"; "layer", where each layer keeps its input and runs again right before its
    backward; "stage", where the stage does. What a layer sends and the next one gets is one tensor.
    """
    settled, shared = 0, layers[0].input  # shared: what is kept of the tensor between two layers
    others = whole = peak = 0
    for layer in layers:
        others = settled + max(shared, layer.input)
        sent_back = {"none": 0, "layer": layer.output, "stage": layers[-1].output}[recompute]
        peak = max(peak, others + layer.forward_peak + sent_back)  # a gradient waits for the rerun
        shared = max(shared, layer.input if recompute == "layer" else layer.input_kept)
        if not layer.in_place:
            settled, shared = settled + shared, 0
        others = settled + shared
        whole = max(whole, others + layer.kept + layer.output_kept)
        peak = max(peak, others + layer.backward_peak)
        if recompute != "layer":
            settled, shared = settled + layer.kept, max(shared, layer.output_kept)
    waiting = {"none": whole, "layer": others, "stage": layers[0].input}[recompute]
    return Activations(waiting, whole, peak - whole)


# ----------------------------------------------------------------------------------- one layer


def make_and_run(make: Callable, number: int, x: Tensor, fake, kernels, counted) -> tuple:
    """Make a layer, without memory where that works, and run it."""
    if isinstance(make, nn.Module):
        raise UserError(f"layer {number} is a module: give a function that makes it")
    reason = ""
    for device in ("meta", "cpu"):
        name, what = f"layer {number}", "cannot be made"
        try:
            with torch.device(device):
                layer = make()
            name += f" ({type(layer).__name__})"
            what = f"does not run on {tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
            check_layer(layer)
            with fake, kernels:
                measured, sent = run_layer_once(layer, x)
            parameters, *tied, weights = count_weights(layer, counted, number)
            frozen = sum(w.numel() for w in layer.parameters() if not w.requires_grad)
            row = Measured(type(layer).__name__, parameters, tied[0], tied[1], frozen, *measured)
            return row, sent, weights, device
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        except NO_VALUES as error:
            raise UserError(f"{name} looks at values ({error}), and has none: {PROFILE}") from None
        except Exception as error:
            reason = f"{name} {what}: {type(error).__name__}: {str(error).strip()}"
            if "meta" not in reason:  # it needs no values: do not make it for real
                break
    raise UserError(reason.splitlines()[0][:300])


def check_layer(layer: Any) -> None:
    if not isinstance(layer, nn.Module):
        raise UserError("is no nn.Module")
    for part in layer.modules():
        if isinstance(part, UNCOUNTED):
            raise UserError(f"has a {type(part).__name__}, {NO_FLOPS}")
        for tensor in (*part.parameters(False), *part.buffers(False)):
            if tensor.device.type not in ("meta", "cpu"):
                raise UserError(f"is on {tensor.device}: make it on the CPU")


def count_weights(layer: nn.Module, counted, number: int) -> tuple[int, int, int, Storages]:
    """Its parameters, those of them that an earlier layer has too, which, and their memory."""
    sizes = {(w.untyped_storage(), w.storage_offset()): w.numel() for w in layer.parameters()}
    owners = {place: counted.get(place[0], {}).get(place[1], number) for place in sizes}
    tied = {place: owner for place, owner in owners.items() if owner < number}
    for memory, start in sizes:
        counted.setdefault(memory, {}).setdefault(start, number)
    there, memories = min(tied.values(), default=-1), Storages(memory for memory, _ in sizes)
    return sum(sizes.values()), sum(sizes[place] for place in tied), there, memories


def stand_in(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fake tensor on the CPU, laid out like this one in as much memory."""
    kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.empty(numbers, dtype=kind, device="cpu")
    fake = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def run_layer_once(layer: nn.Module, x: Tensor) -> tuple[tuple, Tensor]:
    """Forward and backward of a copy, on a tensor like x. Also returns a tensor like its output."""
    own = (leaf for part in layer.modules() for leaf in tree_leaves(vars(part)))
    layer = copy.deepcopy(layer, {id(t): stand_in(t) for t in own if isinstance(t, Tensor)})
    for weight in layer.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    given = Opaque.apply((), False, x)
    before, room = weakref.ref(given.untyped_storage()), x.untyped_storage().nbytes()
    with Alive() as alive:
        y = layer(given)
    del given
    if not isinstance(y, Tensor):
        raise UserError(f"returns a {type(y).__name__}: a layer returns one tensor")
    after, size = weakref.ref(y.untyped_storage()), y.untyped_storage().nbytes()
    in_place, new = after() is before(), after() in alive.made
    sent, end, peak, flops = stand_in(y), Opaque.apply((), True, y), alive.peak, alive.flops
    del y  # from now on, what exists is what the graph keeps
    input_kept, output_kept = room * bool(before()), size * bool(new and after())
    kept, to_input = alive.now - output_kept, 0
    if end.requires_grad:
        gradient = torch.empty_like(end)
        with alive:
            if x.requires_grad:
                torch.autograd.grad(end, x, gradient, retain_graph=True, allow_unused=True)
            to_input, alive.peak = alive.flops - flops, alive.now
            end.backward(gradient)
    sizes = x.nbytes, sent.nbytes, in_place, input_kept, output_kept, kept, peak, alive.peak
    return (*sizes, flops, to_input, alive.flops - flops - 2 * to_input), sent


class Opaque(torch.autograd.Function):
    """An op of which only memory matters: what it makes, keeps and, if it does, sends back."""

    @staticmethod
    def forward(ctx, keep, sends_back, *like):
        ctx.save_for_backward(*keep)
        ctx.make = [partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype) for t in like]
        ctx.sends_back = sends_back
        return ctx.make[0]()

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *(make() if ctx.sends_back else None for make in ctx.make)


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made under it and still exist, the most so far; and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.made = Storages(), Storages()
        self.now = self.peak = self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, op.overloadpacket
        device, inputs = kwargs.get("device"), memory_of((args, kwargs))
        if device and device.type != "cpu":  # fake tensors may crash there
            raise UserError(f"puts a tensor on {device}: it must stay on the CPU")
        if op.namespace not in ("aten", "prim", "prims", "profiler"):
            raise UserError(f"calls {op}, {NO_FLOPS}")
        dtypes = {str(each.dtype) for each in args if isinstance(each, Tensor)}
        if packet in (aten.mm, aten.addmm) and len(dtypes) > 1:  # fake tensors let that pass
            raise TypeError(f"a product of {' and '.join(sorted(dtypes))}")
        self.given.update(memory for memory in inputs if memory not in self.made)
        result = op(*args, **kwargs)
        self.flops += FLOPS[packet](*args, **kwargs, out_val=result) if packet in FLOPS else 0
        for memory in memory_of(result):
            if memory not in self.given and memory not in self.made:
                self.made.add(memory)
                self.now += memory.nbytes()
                weakref.finalize(memory, self.free, memory.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size: int) -> None:
        self.now -= size


def memory_of(tree) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [each.untyped_storage() for each in tensors if each.layout is torch.strided]


@contextlib.contextmanager
def quietly(dtype: torch.dtype | None) -> Iterator[None]:
    """With this default type; no warning, no traceback in a log, no draw from the generator."""
    log, before = logging.getLogger("torch._subclasses.fake_tensor"), torch.get_default_dtype()
    silent, log.disabled = log.disabled, True
    torch.set_default_dtype(dtype or before)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = silent
        torch.set_default_dtype(before)


# ----------------------------------------------------------------------------- CUDA's kernels


class LikeCUDA(TorchFunctionMode):
    """The kernels that CUDA takes, where they keep something else than the CPU's."""

    def __init__(self, fused_norms: bool):
        super().__init__()
        norm = fused_rms_norm if fused_norms else rms_norm_in_python
        ours = {"scaled_dot_product_attention": attention, "dropout": dropout, "rms_norm": norm}
        self.kernels: dict[Any, Any] = {getattr(F, name): kernel for name, kernel in ours.items()}
        whole: Any = F.multi_head_attention_forward  # hides from a mode what it calls
        names = {**vars(F), **ours}
        self.kernels[whole] = FunctionType(whole.__code__, names, None, whole.__defaults__)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.kernels.get(function, function)(*args, **kwargs or {})


def fused_rms_norm(input, normalized_shape, weight=None, eps=None):
    """Keeps its input, its weight and a number per row. (The CPU's keeps copies in fp32.)"""
    kept = [input] if weight is None else [input, weight]
    per_row = torch.empty(input.shape[: -len(normalized_shape)], dtype=torch.float32)
    return Opaque.apply([*kept, per_row], True, *kept)


def rms_norm_in_python(input, normalized_shape, weight=None, eps=None):
    y, dims = input.float(), [*range(-len(normalized_shape), 0)]
    y = (y * torch.rsqrt(y.pow(2).mean(dims, keepdim=True) + 1e-6)).to(input.dtype)
    return y if weight is None else weight * y


def dropout(input, p=0.5, training=True, inplace=False):
    """Keeps a mask of bools. (In place, and on the CPU, it is one of numbers.)"""
    if training and p and not inplace:
        return torch.native_dropout(input, p, True)[0]
    return F.dropout(input, p, training, inplace)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """Chosen as in PyTorch's cuda/sdp_utils.cpp; cuDNN's, which Hopper prefers, keeps as much."""
    parts, size, dense = (query, key, value), query.element_size(), query.dim() == 4
    widths, width = {part.shape[-1] for part in parts}, query.shape[-1]
    same_heads = dense and len({part.shape[1] for part in parts}) == 1
    plain = dense and attn_mask is None and (same_heads or more.get("enable_gqa"))
    if plain and size == 2 and len(widths) == 1 and width <= 256:
        if width % 8:
            parts = tuple(F.pad(part, (0, -width % 8)) for part in parts)
        return FLASH(*parts, dropout_p, is_causal)[0][..., :width]
    if same_heads and size < 8 and not any(each * size % 16 for each in widths):
        if attn_mask is not None:  # one of bools becomes one of numbers
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        return EFFICIENT(*parts, attn_mask, True, dropout_p, is_causal)[0]
    return MATH(*parts, attn_mask, dropout_p, is_causal, **more)[0]
