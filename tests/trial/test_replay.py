"""What has not changed is not computed again, and nobody could tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.model.surgery import owners
from autocompress.nested import leaves
from autocompress.trial import replay
from autocompress.trial.replay import Replay, can_replay
from tests.conftest import ZOO


def run(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


class Counting(nn.Linear):
    """How often it has run."""

    ran = 0

    def forward(self, input: Tensor) -> Tensor:
        self.ran += 1
        return super().forward(input)


def chain(*between: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Counting(6, 6), *(make() for make in between), Counting(6, 6), Counting(6, 3)).eval()


@pytest.mark.parametrize("name", ZOO)
def test_with_any_one_weight_changed_any_model_says_what_it_would_say(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = ZOO[name]
    model, batches = build().eval(), [inputs(), inputs()]
    assert can_replay(model, batches, run)
    again = Replay(model, lambda: run(model, batches[0]))
    for key, places in owners(model).items():
        weight = model.state_dict(keep_vars=True)[key]
        if not weight.is_floating_point():
            continue
        before = weight.detach().clone()
        weight.data.mul_(1.5)
        plain = [run(model, batch) for batch in batches]
        for at, batch in enumerate(batches):
            with again.since([module for module, _ in places], at):
                assert same(run(model, batch), plain[at]), key
        weight.data.copy_(before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_ended_before_the_change_is_run_once_for_each_batch() -> None:
    model, batches = chain(nn.ReLU), [torch.randn(4, 6), torch.randn(5, 6)]
    again = Replay(model, lambda: run(model, batches[0]))
    ran = model[0].ran
    for _ in range(3):
        for at, batch in enumerate(batches):
            with again.since([model[3]], at):
                run(model, batch)
    assert (model[0].ran, model[3].ran) == (ran + 2, ran + 6)
    with again.since([model[0]], 0):
        run(model, batches[0])
    assert model[0].ran == ran + 3


def test_outputs_that_are_changed_in_place_are_kept_as_they_were() -> None:
    model, x = chain(lambda: nn.ReLU(inplace=True)), torch.randn(4, 6)
    again, plain = Replay(model, lambda: run(model, x)), run(model, x)
    for _ in range(3):
        with again.since([model[3]], 0):
            assert same(run(model, x), plain)


class Aside(nn.Module):
    """Its first layer leaves something behind for its last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Counting(6, 6), nn.Linear(6, 3)
        self.first.register_buffer("seen", torch.zeros(6), persistent=False)
        self.first.forward = self.noted  # type: ignore[method-assign]

    def noted(self, input: Tensor) -> Tensor:
        self.first.seen = input.mean(0)
        return Counting.forward(self.first, input)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x) + self.first.seen)
        return out


def test_models_that_tell_more_than_their_outputs_are_found_out() -> None:
    model, batches = Aside().eval(), [torch.randn(4, 6), torch.randn(4, 6)]
    assert not can_replay(model, batches, run)
    assert vars(model.first)["forward"] == model.noted
    assert can_replay(chain(nn.ReLU), batches, run)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_modules_are_left_alone() -> None:
    batches = [torch.randn(4, 6), torch.randn(4, 6)]
    assert not can_replay(nn.Sequential(torch.jit.script(nn.Linear(6, 3))), batches, run)


def test_what_never_ran_changes_what_computes_with_it() -> None:
    """Attention computes with the weights of its output layer itself."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    again = Replay(model, lambda: run(model, x))
    with again.since([model.self_attn.out_proj], 0):
        run(model, x)
    model.self_attn.out_proj.weight.data.mul_(2)
    plain = run(model, x)
    with again.since([model.self_attn.out_proj], 0):
        assert same(run(model, x), plain)


class Functional(nn.Module):
    """Takes the ReLU of its layers itself, also in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Counting(6, 6), Counting(6, 6), Counting(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.first(x))
        x = torch.relu(self.second(x))
        out: Tensor = self.last(x.view(len(x), -1))
        return out


def test_only_the_shape_is_kept_of_what_is_computed_with_for_nothing() -> None:
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(4, 6)
    assert can_replay(model, [x, -x], run)
    again, plain = Replay(model, lambda: run(model, x)), run(model, x)
    before = [layer.ran for layer in model.children()]
    for changed, expected in ((model.last, [1, 1, 1]), (model.last, [1, 1, 2]), (model.second, [2, 2, 3])):
        with again.since([changed], 0):
            assert same(run(model, x), plain)
        assert [layer.ran - ran for layer, ran in zip(model.children(), before, strict=True)] == expected
        whole = {model.second} if changed is model.last else {model.first}
        assert {module for (module, _), known in again._outputs.items() if known.whole} == whole
        assert sum(replay._bytes(known) for known in again._outputs.values() if not known.whole) <= 4


class Both(nn.Module):
    """Its head looks at a large and at a small output."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.head = Counting(6, 50), Counting(6, 6), Counting(56, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.large(x), self.small(x)], 1))
        return out


@pytest.mark.parametrize(("kept", "large"), [(4 * 4 * 56, 1), (4 * 4 * 55, 3)])
def test_no_more_is_kept_than_is_allowed_and_the_largest_goes(
    kept: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Both().eval(), torch.randn(4, 6)
    monkeypatch.setattr(replay, "KEPT_BYTES", kept)
    again, plain = Replay(model, lambda: run(model, x)), run(model, x)
    ran = [layer.ran for layer in model.children()]
    for _ in range(3):
        with again.since([model.head], 0):
            assert same(run(model, x), plain)
    assert [layer.ran - before for layer, before in zip(model.children(), ran, strict=True)] == [large, 1, 3]
    with suppress(KeyError), again.since([model.head], 0):
        run(model, x)
        raise KeyError  # the rest need not be run
    assert {module for module, _ in again._outputs} <= ({model.small} if large > 1 else {model.large, model.small})


def test_outputs_are_kept_as_long_as_someone_looks_at_them() -> None:
    """Of a chain, the last that ended; of one that begins with a shape and ends with a sum, these too."""
    torch.manual_seed(0)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.chain, self.head = Counting(6, 6), chain(nn.ReLU, nn.Tanh), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            rows = len(x)
            out: Tensor = self.head(self.chain(x)) * rows + x[:, :3]
            return out

    model, x = Around().eval(), torch.randn(4, 6)
    again, plain = Replay(model, lambda: run(model, x)), run(model, x)
    for module in (model.chain[3], model.chain[4], model.head):
        with again.since([module], 0):
            assert same(run(model, x), plain)
        before = {"chain.3": model.chain[2], "chain.4": model.chain[3], "head": model.chain}
        name = next(name for name, m in model.named_modules() if m is module)
        assert {module for module, _ in again._outputs} == {model.into, before[name]}
