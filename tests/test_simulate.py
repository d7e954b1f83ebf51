"""All ranks of a job in one process: they train as eager PyTorch and as real ranks do, and touch nothing."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import zgraph
from tests.choices import pairwise
from tests.models import Batch
from tests.optimizers import OPTIMIZERS
from tests.ranks import Ranks
from tests.reference import assert_equal
from zgraph.errors import CaptureError, OptimizerError, OptionError, RankError, StateError, ZgraphError
from zgraph.program import Stage


class Scale(nn.Module):
    """The loss is ``w * x``, and so its gradient is ``x``; a buffer remembers what this rank has seen."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x
        return (self.w * x).sum()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def test_two_ranks_average_their_gradients_and_keep_their_own_buffers() -> None:
    model = Scale()
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.5, momentum=0.5), world_size=2, zero=3)
    said = []
    for x0, x1 in ((1.0, 3.0), (0.0, 4.0)):
        loss = ranks.train_step([(torch.tensor([x0]),), (torch.tensor([x1]),)])
        m = ranks.optimizer_state()["w"]["momentum_buffer"]
        w, *seen = (ranks.state_dict()["w"], ranks.state_dict(rank=0)["seen"], ranks.state_dict(rank=1)["seen"])
        said.append(f"loss {loss.item()}, momentum {m.item()}, w {w.item()}, seen {[s.item() for s in seen]}")
    assert_expected_inline(
        "\n".join(said),
        """\
loss 2.0, momentum 2.0, w 0.0, seen [1.0, 3.0]
loss 0.0, momentum 3.0, w -1.5, seen [1.0, 7.0]""",
    )


class Traits(nn.Module):
    """Tied, frozen and unused parameters, one without dimensions, and a buffer."""

    mean: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens, self.middle = nn.Embedding(13, 5), nn.Linear(5, 5)
        self.head, self.unused = nn.Linear(5, 13, bias=False), nn.Linear(2, 2)
        self.head.weight = self.tokens.weight
        self.middle.bias.requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(0.8))
        self.register_buffer("mean", torch.linspace(-1, 1, 5))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.tokens(tokens) - self.mean))
        x = F.dropout(x, self.dropout, self.training)
        return F.cross_entropy(self.head(x) * self.temperature, targets)


def traits() -> tuple[nn.Module, nn.Module]:
    """Two equal models in float64."""
    torch.manual_seed(0)
    first, second = Traits().double(), Traits().double()
    second.load_state_dict(first.state_dict())
    return first, second


def tokens(num_samples: int) -> tuple[Tensor, Tensor]:
    return torch.randint(13, (num_samples,)), torch.randint(13, (num_samples,))


def eager_step(model: nn.Module, optimizer: Optimizer, *args: Any) -> Tensor:
    optimizer.zero_grad()
    loss = model(*args)
    loss.backward()
    optimizer.step()
    return loss.detach()


def parts(batch: tuple[Tensor, ...], world: int) -> list[tuple[Tensor, ...]]:
    """One rank's part of a batch after the other."""
    return list(zip(*(t.chunk(world) for t in batch), strict=True))


def assert_like_eager(ranks: zgraph.SimulatedRanks, model: nn.Module, optimizer: Optimizer, what: str) -> None:
    """Parameters, buffers and optimizer state are those of eager training, to rounding in float64."""
    assert_equal(ranks.state_dict(), model.state_dict(), what)
    found = ranks.optimizer_state()
    for name, p in model.named_parameters():
        expected = optimizer.state.get(p, {})
        assert found.get(name, {}).keys() == expected.keys(), name
        for key, value in expected.items():
            mine, theirs = torch.as_tensor(found[name][key]), torch.as_tensor(value)
            assert_equal({f"{key} of {name}": mine}, {f"{key} of {name}": theirs}, what)


QUICK = [(1, 3), (2, 0), (2, 1), (3, 2), (64, 3)]


@pairwise(
    *(("adamw", world, zero) for world, zero in QUICK),
    optimizer=["adamw", "sgd", "lion"],
    world=[1, 2, 3, 64],
    zero=[0, 1, 2, 3],
)
def test_ranks_train_like_one_eager_process_on_all_their_batches(optimizer: str, world: int, zero: int) -> None:
    model, reference = traits()
    ranks = zgraph.simulate_ranks(model, OPTIMIZERS[optimizer](model), world_size=world, zero=zero, bucket_bytes=256)
    eager = OPTIMIZERS[optimizer](reference)
    for step in range(3):
        batch = tokens(2 * world)
        loss = ranks.train_step(parts(batch, world))
        assert_equal({"loss": loss}, {"loss": eager_step(reference, eager, *batch)}, f"step {step}")
        assert_like_eager(ranks, reference, eager, f"after step {step}")
    assert ranks.program.mesh.size == world
    assert ranks.program.stage is Stage.INPLACE


def real_steps(zero: int) -> tuple[list[Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Three losses on real ranks in float32, and the state afterwards; each rank draws its own dropout."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Traits(dropout=0.3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    batches = [tokens(12) for _ in range(3)]
    zgraph.compile(model, optimizer=optimizer, zero=zero)
    torch.manual_seed(11 + rank)
    losses = [model.train_step(*parts(batch, world)[rank]) for batch in batches]
    return losses, model.state_dict(), list(optimizer.state_dict()["state"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), [(2, 0), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)])
def test_simulated_ranks_are_bit_for_bit_the_real_ones(ranks: Ranks, world: int, zero: int) -> None:
    (losses, params, state), *_ = ranks.run(real_steps, zero, world=world)
    model = Traits(dropout=0.3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    batches = [tokens(12) for _ in range(3)]
    simulated = zgraph.simulate_ranks(model, optimizer, world_size=world, zero=zero, seed=11)
    for batch, loss in zip(batches, losses, strict=True):
        found = simulated.train_step(parts(batch, world))
        assert_equal({"loss": found}, {"loss": loss}, "loss")
        assert torch.equal(found, loss) or world > 2  # gloo's all-reduce has an order of its own
    assert simulated.state_dict().keys() == params.keys()
    for name, value in simulated.state_dict().items():
        assert torch.equal(value, params[name]), name
    found_state = simulated.optimizer_state()
    with_state = [entries for name, _ in model.named_parameters() if (entries := found_state.get(name))]
    for mine, theirs in zip(with_state, state, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[key]), theirs[key]) for key in mine)


# What ranks do not have in common


def test_batch_norm_follows_each_ranks_own_batches() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    optimizer = SGD(model.parameters(), lr=0.0)
    ranks = zgraph.simulate_ranks(model, optimizer, world_size=3, loss=lambda output, _: output.square().mean())
    batches = [[torch.randn(5, 4).double() for _ in range(3)] for _ in range(2)]
    for step in batches:
        ranks.train_step([(x,) for x in step])
    for rank in range(3):
        model.load_state_dict(ranks.state_dict() | {"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)})
        for step in batches:
            model(step[rank])
        assert_equal(
            {name: b for name, b in ranks.state_dict(rank).items() if "running" in name},
            {name: b for name, b in model.state_dict().items() if "running" in name},
            f"rank {rank}",
        )
        assert ranks.state_dict(rank)["1.num_batches_tracked"] == 2


@pytest.mark.parametrize("seed", [5, [9, 5, 5]])
def test_rank_r_draws_what_a_process_draws_after_manual_seed(seed: int | list[int]) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)).double()
    optimizer = SGD(model.parameters(), lr=0.0)
    x = torch.randn(3, 64).double()
    ranks = zgraph.simulate_ranks(
        model, optimizer, world_size=3, seed=seed, loss=lambda output, _: output.square().mean()
    )
    expected = []
    for rank in range(3):
        torch.manual_seed(5 + rank if seed == 5 else seed[rank])  # type: ignore[index]
        expected.append([model(x).square().mean().detach() for _ in range(2)])
    for step in range(2):
        torch.rand(step + 1)  # what else draws in this process does not matter
        mean = (expected[0][step] + expected[1][step] + expected[2][step]) / 3
        assert_equal({"loss": ranks.train_step([(x,)] * 3)}, {"loss": mean}, f"step {step}")


class Counter(nn.Module):
    """Counts in a tensor that is no buffer; two buffers change places at each step."""

    a: Tensor
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w, self.count = nn.Parameter(torch.ones(2)), torch.zeros(2)
        self.register_buffer("a", torch.tensor([1.0, 2.0]))
        self.register_buffer("b", torch.tensor([3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.count += x
        self.a, self.b = self.b, self.a
        return (self.w * self.count * self.a).sum()


def test_what_forward_writes_to_is_each_ranks_own() -> None:
    model = Counter()
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.0), world_size=2)
    losses = [ranks.train_step([(torch.full([2], x),) for x in (1.0, 2.0)]).item() for _ in range(3)]
    assert losses == [1.5 * 7, 3.0 * 3, 4.5 * 7]
    assert ranks.state_dict()["a"].tolist() == [3.0, 4.0]
    assert model.count.tolist() == [0.0, 0.0]
    assert model.a.tolist() == [1.0, 2.0]


# The user's objects


def test_the_users_model_optimizer_and_generator_stay_as_they_are() -> None:
    model, _ = traits()
    optimizer = AdamW(model.parameters())
    eager_step(model, optimizer, *tokens(4))
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = {p: {key: (value, value.clone()) for key, value in s.items()} for p, s in optimizer.state.items()}
    batches = parts(tokens(4), 2)
    generator = torch.get_rng_state()
    ranks = zgraph.simulate_ranks(model, optimizer, world_size=2)
    for _ in range(2):
        ranks.train_step(batches)
    assert torch.equal(torch.get_rng_state(), generator)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, old) for name, (value, old) in before.items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert optimizer.state.keys() == state.keys()
    for p, entries in state.items():
        assert all(
            optimizer.state[p][key] is value and torch.equal(value, old) for key, (value, old) in entries.items()
        )


@pytest.mark.parametrize("zero", [0, 3])
def test_what_ranks_give_out_is_a_copy(zero: int) -> None:
    model = Scale()
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1, momentum=0.9), world_size=2, zero=zero)
    ranks.train_step([(ones(1),)] * 2)
    for tensor in (*ranks.state_dict().values(), *ranks.optimizer_state()["w"].values()):
        torch.as_tensor(tensor).zero_()
    assert all(tensor != 0 for tensor in ranks.state_dict().values())
    assert ranks.optimizer_state()["w"]["momentum_buffer"] == 1


def test_ranks_keep_the_values_they_started_from() -> None:
    model, reference = traits()
    optimizer, eager = AdamW(model.parameters(), lr=1e-2), AdamW(reference.parameters(), lr=1e-2)
    ranks = zgraph.simulate_ranks(model, optimizer, world_size=2)
    for _ in range(2):
        eager_step(model, optimizer, *tokens(4))  # the model itself goes elsewhere meanwhile
        batch = tokens(4)
        ranks.train_step(parts(batch, 2))
        eager_step(reference, eager, *batch)
    assert_like_eager(ranks, reference, eager, "after 2 steps")


@pytest.mark.parametrize("make", [AdamW, OPTIMIZERS["lion"], pytest.param(Adagrad, marks=pytest.mark.slow)])
def test_training_goes_on_from_the_state_that_the_optimizer_has(make: Callable[[Any], Optimizer]) -> None:
    model, _ = traits()
    optimizer = make(model if make is OPTIMIZERS["lion"] else model.parameters())
    for _ in range(2):
        eager_step(model, optimizer, *tokens(4))
    ranks = zgraph.simulate_ranks(model, optimizer, world_size=2, zero=2)
    assert_like_eager(ranks, model, optimizer, "at the start")
    for step in range(2):
        batch = tokens(4)
        loss = ranks.train_step(parts(batch, 2))
        assert_equal({"loss": loss}, {"loss": eager_step(model, optimizer, *batch)}, f"step {step}")
    assert_like_eager(ranks, model, optimizer, "at the end")


def test_a_schedule_of_the_users_optimizer_is_followed_without_capturing_again() -> None:
    model, reference = traits()
    optimizer, eager = SGD(model.parameters(), lr=0.5), SGD(reference.parameters(), lr=0.5)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.3) for o in (optimizer, eager)]
    ranks = zgraph.simulate_ranks(model, optimizer, world_size=2)
    programs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no step but the ranks' is made, which the scheduler must see
        for _ in range(3):
            batch = tokens(4)
            ranks.train_step(parts(batch, 2))
            eager_step(reference, eager, *batch)
            programs.append(ranks.program)
            for schedule in schedules:
                schedule.step()
    assert_like_eager(ranks, reference, eager, "after 3 steps")
    assert all(program is programs[0] for program in programs)


class Both:
    """Two simulated ranks and one eager process, trained side by side, by an optimizer without the last parameter."""

    def __init__(self) -> None:
        self.models = traits()
        self.optimizers = [AdamW(list(model.parameters())[:-1], lr=1e-2) for model in self.models]
        self.ranks = zgraph.simulate_ranks(self.models[0], self.optimizers[0], world_size=2, bucket_bytes=64)

    def step(self, num_samples: int) -> zgraph.Program:
        batch = tokens(num_samples)
        loss = self.ranks.train_step(parts(batch, 2))
        assert_equal({"loss": loss}, {"loss": eager_step(self.models[1], self.optimizers[1], *batch)}, "loss")
        assert_like_eager(self.ranks, self.models[1], self.optimizers[1], "afterwards")
        return self.ranks.program


def test_a_batch_of_another_shape_has_a_program_of_its_own() -> None:
    both = Both()
    first, other, again = both.step(4), both.step(6), both.step(4)
    assert first is again
    assert first is not other


@pytest.mark.slow
def test_what_is_trained_may_change_between_steps() -> None:
    both = Both()
    first = both.step(4)
    for model in both.models:
        model.get_parameter("middle.weight").requires_grad_(False)
        model.get_parameter("middle.bias").requires_grad_(True)
    frozen = both.step(4)
    for model, optimizer in zip(both.models, both.optimizers, strict=True):
        model.get_parameter("middle.weight").requires_grad_(True)
        optimizer.add_param_group({"params": [list(model.parameters())[-1]], "weight_decay": 0.5})
    thawed = both.step(4)
    both.step(4)
    assert len({id(program) for program in (first, frozen, thawed)}) == 3


def test_training_mode_is_the_models() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.randn(3, 64).double()
    ranks = zgraph.simulate_ranks(
        model, SGD(model.parameters(), lr=0.0), world_size=2, loss=lambda output, _: output.square().mean()
    )
    ranks.train_step([(x,)] * 2)
    model.eval()
    assert_equal({"loss": ranks.train_step([(x,)] * 2)}, {"loss": model(x).square().mean().detach()}, "eval")


# Batches


@pytest.mark.parametrize(
    "spell",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"tokens": x, "targets": y},
        lambda x, y: ((x,), {"targets": y}),
        lambda x, y: Batch((x, y), {}),
    ],
    ids=["tuple", "list", "dict", "pair", "named pair"],
)
def test_a_batch_is_what_the_model_is_called_with(spell: Callable[[Tensor, Tensor], Any]) -> None:
    model, _ = traits()
    x, y = tokens(4)
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=1)
    assert_equal({"loss": ranks.train_step([spell(x, y)])}, {"loss": model(x, y).detach()}, "one step")


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"world_size": 0}, OptionError, "world_size=0 is not a number of ranks"),
        ({"world_size": True}, OptionError, "world_size=True"),
        ({"world_size": 2.0}, OptionError, "world_size=2.0"),
        ({"world_size": 2, "seed": [1, 2, 3]}, OptionError, "seed has 3 seeds for 2 ranks"),
        ({"world_size": 2, "zero": 4}, OptionError, "zero=4 is out of range"),
        ({"world_size": 2, "zeroo": 3}, OptionError, "unknown option 'zeroo'"),
        ({"world_size": 2, "passes": [3]}, OptionError, "passes holds a int"),
        ({"world_size": 2, "optimizer": None}, OptimizerError, "ranks need an optimizer"),
        ({"world_size": 2, "optimizer": 3}, OptionError, "optimizer is a int"),
        ({"world_size": 2, "model": 3}, OptionError, "model is a int"),
        ({"world_size": 2, "model": Scale()}, OptimizerError, "not one of the model's"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[ZgraphError], says: str) -> None:
    model = Scale()
    given = {"model": model, "optimizer": SGD(model.parameters(), lr=0.1), **options}
    with pytest.raises(error, match=says) as refusal:
        zgraph.simulate_ranks(**given)
    assert refusal.value.fix


def test_a_model_on_meta_is_refused_with_the_name_of_what_has_no_value() -> None:
    with torch.device("meta"):
        model = Scale()
    with pytest.raises(StateError, match="param:w is on meta"):
        zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=2)
    model.w = nn.Parameter(torch.ones(1))
    with pytest.raises(StateError, match="buffer:seen is on meta"):
        zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=2)


def test_a_compiled_model_is_refused() -> None:
    model = Scale()
    optimizer = SGD(model.parameters(), lr=0.1)
    zgraph.compile(model, optimizer=optimizer)
    with pytest.raises(OptionError, match="compiled already"):
        zgraph.simulate_ranks(model, optimizer, world_size=2)


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([(ones(1),)], ZgraphError, "train_step was given 1 batches for 3 ranks"),
        (ones(3), ZgraphError, "train_step was given a Tensor"),
        ([(ones(1),), ones(1), (ones(1),)], ZgraphError, "the batch of rank 1 is a Tensor"),
        (
            [(ones(1),), (ones(1),), (ones(2),)],
            RankError,
            r"of rank 2 differs from that of rank 0: args\[0\] is torch.float32 \(2,\)",
        ),
        ([(ones(1),), (ones(1).double(),), (ones(1),)], RankError, r"rank 1 .* args\[0\] is torch.float64"),
        (
            [{"x": ones(1)}, {"x": ones(1), "y": 1}, {"x": ones(1)}],
            RankError,
            r"rank 1 .* kwargs\['y'\] is 1, not nothing",
        ),
        ([{"x": [ones(1)]}, {"x": (ones(1),)}, {"x": [ones(1)]}], RankError, "rank 1 is built otherwise"),
        ([({"a": {1}},)] * 3, CaptureError, "holds a set"),
    ],
    ids=["too few", "tensor", "bare", "shape", "dtype", "keyword", "container", "object"],
)
def test_batches_that_do_not_fit_are_refused_with_rank_and_argument(
    batches: Any, error: type[ZgraphError], says: str
) -> None:
    model = Scale()
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=3)
    with pytest.raises(error, match=says) as refusal:
        ranks.train_step(batches)
    assert refusal.value.fix
    assert ranks.state_dict()["w"] == 1


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.table = nn.Dropout(0.5), nn.Embedding(8, 16)

    def forward(self, index: Tensor) -> Tensor:
        x = self.drop(self.table.weight).sum()
        return x + self.table(index).sum()


def test_a_rank_that_fails_is_named_with_the_line_and_nothing_has_happened() -> None:
    model = Looks().double()
    model_and_rest = model, AdamW(model.parameters())
    ranks, others = (zgraph.simulate_ranks(*model_and_rest, world_size=3) for _ in range(2))
    good, bad = [(torch.tensor([i]),) for i in (1, 2, 3)], [(torch.tensor([i]),) for i in (1, 8, 3)]
    for each in (ranks, others):
        each.train_step(good)
    with pytest.raises(RankError, match=r"rank 1 failed in aten\.embedding\.default: IndexError") as refusal:
        ranks.train_step(bad)
    assert "return x + self.table(index).sum()" in (refusal.value.where or "")
    assert torch.equal(ranks.train_step(good), others.train_step(good)), "state or random numbers have moved on"


def test_a_model_that_has_changed_is_refused() -> None:
    model = Scale()
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=1)
    model.register_buffer("late", ones(2))
    with pytest.raises(StateError, match=r"late is f32\[2\], and was not there"):
        ranks.train_step([(ones(1),)])


def test_there_is_no_program_before_the_first_step_and_no_state_of_other_ranks() -> None:
    model = Scale()
    ranks = zgraph.simulate_ranks(model, SGD(model.parameters(), lr=0.1), world_size=2)
    with pytest.raises(ZgraphError, match="nothing is compiled yet"):
        _ = ranks.program
    with pytest.raises(OptionError, match="rank=2 is not one of 2 ranks"):
        ranks.state_dict(rank=2)
    assert ranks.state_dict()["w"] == 1
    assert ranks.optimizer_state() == {}


calls = itertools.count()


@torch.library.custom_op("zgraph_tests::fickle", mutates_args=(), tags=(torch.Tag.pointwise,))
def fickle(x: Tensor) -> Tensor:
    """Gives something else each time, and does not say so."""
    return x + next(calls)


fickle.register_fake(torch.empty_like)


class Fickle(SGD):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(fickle(p.grad), alpha=-group["lr"])


def test_parameters_that_part_between_ranks_are_found() -> None:
    model = Scale()
    ranks = zgraph.simulate_ranks(model, Fickle(model.parameters(), lr=0.1), world_size=3, zero=0)
    ranks.train_step([(ones(1),)] * 3)
    with pytest.raises(RankError, match="param:w has another value on rank 1 than on rank 0"):
        ranks.state_dict()
