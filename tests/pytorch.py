"""PyTorch's own schedules. The only file of the tests that uses its private names."""

import types

from torch.distributed.pipelining import _backward
from torch.distributed.pipelining import schedules as theirs


class RecordingStage:
    """Stands in for a PipelineStage: nothing to send or receive, notes what it is told to run."""

    def __init__(self, stage_index):
        self.stage_index = stage_index
        self.ran = []

    def forward_one_chunk(self, microbatch, *args, **kwargs):
        self.ran.append(("F", microbatch))

    def backward_one_chunk(self, microbatch, **kwargs):
        self.ran.append(("B", microbatch))

    def nothing(self, *args, **kwargs):
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = nothing
    perform_reduce_grad = nothing


def what_pytorch_executes(schedule_class, stage, num_stages, num_microbatches):
    """The order of forwards and backwards in which PyTorch's engine drives a stage.

    The code that executes (_step_microbatches), not the list that PyTorch prints: in torch 2.13 the
    printed 1F1B is off by one on the last rank.
    """
    engine = object.__new__(schedule_class)
    engine._n_microbatches, engine._num_stages = num_microbatches, num_stages
    engine._stage, engine.scale_grads = RecordingStage(stage), False
    empty = [()] * num_microbatches
    engine._check_inputs = lambda *args: (empty, [{}] * num_microbatches)
    for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
        setattr(engine, name, lambda *args, **kwargs: None)
    engine._step_microbatches()
    return engine._stage.ran


def rows_of_pytorch(name, devices, microbatches, chunks):
    """[[action, ...] of each rank] as that class of PyTorch's makes them, idles included."""
    engine = getattr(theirs, name).__new__(getattr(theirs, name))
    engine.pp_group_size, engine.n_local_stages = devices, chunks
    engine._n_microbatches, engine.num_stages = microbatches, devices * chunks
    engine._num_stages = devices * chunks
    engine._stages = [types.SimpleNamespace() for _ in range(chunks)]
    engine.number_of_rounds = max(1, microbatches // devices)
    engine.microbatches_per_round = microbatches // engine.number_of_rounds
    actions = {r: engine._calculate_single_rank_operations(r) for r in range(devices)}
    if name == "ScheduleInterleavedZeroBubble":
        engine.pipeline_order = actions
        actions = engine._add_bubbles_to_actions(devices * chunks)
    return [actions[rank] for rank in range(devices)]


def cells(rows):
    """[["0F0", ...] of each rank] of its actions; of two that overlap the forward is an F&."""

    def steps(action):
        if not action.sub_actions:
            return [str(action)]
        forward, backward = map(str, action.sub_actions)
        return [forward.replace("F", "F&"), backward]

    return [[step for action in row if action for step in steps(action)] for row in rows]


def save_as_pytorch_does(rows, path):
    engine = types.SimpleNamespace(pipeline_order=dict(enumerate(rows)))
    theirs.PipelineScheduleMulti._dump_csv(engine, str(path))


def runtime_for(num_devices, num_stages, num_microbatches):
    """Its runtime, as far as it makes plans."""
    runtime = theirs._PipelineScheduleRuntime.__new__(theirs._PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages = num_devices, num_stages
    runtime._n_microbatches = num_microbatches
    runtime._stages, runtime.pipeline_order, runtime.rank = [], {}, 0
    runtime._defer_pp_recv = False
    return runtime


def save_as_its_runtime_does(rows, path, num_stages, num_microbatches):
    """With cells about messages and sharding. How many of them?"""
    runtime = runtime_for(len(rows), num_stages, num_microbatches)
    runtime._prepare_schedule_with_comms(dict(enumerate(rows)))
    runtime._dump_csv(str(path))
    actions = [action for row in runtime.pipeline_order_with_comms.values() for action in row]
    assert {"SEND_F", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD"} <= {
        action.computation_type.value for action in actions
    }
    return sum(not action.is_compute_op for action in actions)


def order_that_pytorch_loads(path, num_devices, num_stages, num_microbatches):
    """The cells of what its runtime would compute after reading a CSV file.

    It checks the order, and adds the sends and receives.
    """
    runtime = runtime_for(num_devices, num_stages, num_microbatches)
    runtime._load_csv(str(path))
    ranks = [runtime.pipeline_order_with_comms[rank] for rank in range(num_devices)]
    return cells([[action for action in row if action.is_compute_op] for row in ranks])


def halves_of_pytorch(module, x, output_gradient):
    """(gradient of x, gradients of the weights) by its own split of a backward into I and W."""
    weights = [*module.parameters()]
    outputs = [module(x).clone()]  # it detaches them in place, which a view forbids
    split = _backward.stage_backward_input(outputs, [output_gradient], [x], iter(weights))
    x_gradients, groups = split
    _backward.stage_backward_weight(iter(weights), groups)
    return x_gradients[0], [w.grad for w in weights]
