"""The attention function by itself: what it is told it does, what it can't do it refuses, and FlashAttention agrees."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from pairclf.errors import ModelError
from pairclf.model import attention
from pairclf.model.attention import KERNELS, ScoreOptions, _varlen, attend, mask, pick_kernel
from pairclf.model.batch import Segment, Topology, end_to_end

LENGTHS = [1, 40, 7]
STARTS = torch.tensor([0, 1, 41, 48], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": STARTS}


def states(tokens: int = 48, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of 4 heads that share 2 keys: `(1, 4, T, 16)` and twice `(1, 2, T, 16)`."""
    torch.manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, 16, device=device, dtype=dtype) for heads in (4, 2, 2))  # type: ignore[return-value]


def plainly(
    query: Tensor, key: Tensor, value: Tensor, softcap: float | None, window: int | None, *, behind: bool = False
) -> Tensor:
    """Token by token, from the definition: `(1, heads, T, D)` of one sequence -> `(1, T, heads, D)`."""
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        for token in range(query.shape[2]):
            last = (token + window if window else query.shape[2]) if behind else token + 1
            seen = slice(max(0, token + 1 - window) if window else 0, last)
            scores = key[0, head // 2, seen] @ query[0, head, token] / 4
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out[0, head, token] = scores.softmax(dim=0) @ value[0, head // 2, seen]
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    ("softcap", "window"), [(None, None), (2.0, None), (None, 1), (2.0, 8), (None, 40), (2.0, 100)]
)
def test_attend_packed_equals_the_definition(softcap: float | None, window: int | None) -> None:
    whole = states()
    expected = [
        plainly(*(one[:, :, start:end] for one in whole), softcap, window)
        for start, end in zip(STARTS[:-1].tolist(), STARTS[1:].tolist(), strict=True)
    ]
    found, _ = attend(nn.Module(), *whole, None, softcap=softcap, sliding_window=window, **PACKED)
    assert found.shape == (1, 48, 4, 16)
    assert (found - torch.cat(expected, dim=1)).abs().max() <= 1e-6
    told, _ = attend(nn.Module(), *whole, None, softcap=softcap, sliding_window=window, topology=end_to_end(LENGTHS))
    assert torch.equal(told, found)


# [a a a a ... | b ... | c ...]: b goes on behind 12 of a's 25 tokens, c behind those and 5 of b.
TREE = Topology(
    (Segment(0, 25, ((0, 25),)), Segment(25, 40, ((0, 12), (25, 40))), Segment(40, 48, ((0, 12), (25, 30), (40, 48)))),
    (((0, 12), (25, 30), (40, 48)), ((0, 25),), ((0, 12), (25, 40))),
)


@pytest.mark.parametrize(
    ("softcap", "window", "block"),
    [
        *((None, None, 1), (2.0, None, 128), (None, 1, 4), (2.0, 1, 7), (None, 6, 7), (2.0, 6, 4)),
        *((2.0, 14, 1), (None, 14, 128), (2.0, 100, 4), (None, 100, 1), (2.0, 6, 128), (None, 1, 1)),
    ],
)
def test_attend_shared_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, window: int | None, block: int
) -> None:
    monkeypatch.setattr(attention, "QUERIES_ON_CPU", block)
    query, key, value = states()
    paths = [[place for span in piece.sees for place in range(*span)] for piece in TREE.segments]
    told = {"softcap": softcap, "sliding_window": window}
    whole = [plainly(*(one[:, :, path] for one in (query, key, value)), softcap, window) for path in paths]
    own = [one[:, piece.start - piece.stop :] for one, piece in zip(whole, TREE.segments, strict=True)]
    found, _ = attend(nn.Module(), query, key, value, None, topology=TREE, **told)  # type: ignore[arg-type]
    assert (found - torch.cat(own, dim=1)).abs().max() <= 1e-6
    ends = query[:, :, [47, 24, 39]]
    found, _ = attend(nn.Module(), ends, key, value, None, topology=TREE.at_ends(), **told)  # type: ignore[arg-type]
    expected = torch.cat([whole[piece][:, -1:] for piece in (2, 0, 1)], dim=1)
    assert (found - expected).abs().max() <= 1e-6


def test_varlen_gathers_the_keys_that_pieces_see() -> None:
    told = _varlen(TREE, torch.device("cpu"))
    assert told.queries.tolist() == [0, 25, 40, 48]
    assert told.keys.tolist() == [0, 25, 52, 77]
    assert told.gather is not None
    assert told.gather[52:].tolist() == [*range(12), *range(25, 30), *range(40, 48)]
    assert told.longest == (25, 27)
    assert _varlen(end_to_end([3, 2]), torch.device("cpu")).gather is None


def test_mask_is_none_without_a_given_one() -> None:
    assert mask(batch_size=1, q_length=48, kv_length=48) is None


@pytest.mark.parametrize("told", [PACKED, {}], ids=["packed", "one"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend_drops_out_and_keeps_the_mean(softcap: float | None, told: dict[str, object]) -> None:
    query, key, value = states()
    calm, _ = attend(nn.Module(), query, key, torch.ones_like(value), None, softcap=softcap, **told)  # type: ignore[arg-type]
    rough, _ = attend(nn.Module(), query, key, torch.ones_like(value), None, softcap=softcap, dropout=0.5, **told)  # type: ignore[arg-type]
    assert (calm - 1).abs().max() <= 1e-5
    assert (rough - 1).abs().max() > 0.1
    assert float(rough.mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("unknown", ["s_aux", "position_bias"])
def test_attend_refuses_arguments_it_does_not_know(unknown: str) -> None:
    with pytest.raises(ModelError, match=f"gives {unknown}.*\n.*attn_implementation=eager"):
        attend(nn.Module(), *states(), None, **{unknown: torch.zeros(4)})  # type: ignore[arg-type]


def _both_ways() -> nn.Module:
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("told", [PACKED, {}], ids=["packed", "one"])
@pytest.mark.parametrize(
    ("softcap", "window", "block"),
    [(None, None, 7), (2.0, None, 64), (None, 1, 4), (None, 6, 1), (2.0, 6, 7), (None, 9, 64), (2.0, 39, 16)],
)
def test_attend_both_ways_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, window: int | None, block: int, told: dict[str, object]
) -> None:
    monkeypatch.setattr(attention, "QUERIES_ON_CPU", block)
    whole = states()
    ends = STARTS.tolist() if told else [0, 48]
    expected = [
        plainly(*(one[:, :, start:end] for one in whole), softcap, window, behind=True) for start, end in pairwise(ends)
    ]
    found, _ = attend(_both_ways(), *whole, None, softcap=softcap, sliding_window=window, **told)  # type: ignore[arg-type]
    assert (found - torch.cat(expected, dim=1)).abs().max() <= 1e-6
    if window != 1:
        looks_back, _ = attend(nn.Module(), *whole, None, softcap=softcap, sliding_window=window, **told)  # type: ignore[arg-type]
        assert (found - looks_back).abs().max() > 1e-2


def test_attend_refuses_shared_beginnings_both_ways() -> None:
    with pytest.raises(ModelError, match="sees both ways where sequences share a beginning"):
        attend(_both_ways(), *states(), None, topology=TREE)


@pytest.mark.parametrize(
    ("device", "dtype", "head", "capability", "installed", "kernel", "why"),
    [
        ("cpu", torch.float32, 64, (8, 0), True, "loop", "CUDA alone"),
        ("cuda", torch.float32, 64, (8, 0), True, "loop", "float32"),
        ("cuda", torch.bfloat16, 64, (8, 0), False, "loop", "not installed"),
        ("cuda", torch.float16, 64, (7, 5), True, "loop", "7.5"),
        ("cuda", torch.bfloat16, 512, (9, 0), True, "loop", "at most 256"),
        ("cuda", torch.bfloat16, 256, (8, 9), True, "flash", "installed"),
    ],
)
def test_pick_kernel_goes_by_device_dtype_head_and_package(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head: int,
    capability: tuple[int, int],
    installed: bool,
    kernel: str,
    why: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(attention, "_flash_installed", lambda: installed)
    chosen, reason = pick_kernel(torch.device(device), dtype, head)
    assert chosen == kernel
    assert why in reason


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("topology", "causal"),
    [(end_to_end(LENGTHS), True), (TREE, True), (end_to_end(LENGTHS), False)],
    ids=["packed", "shared", "both ways"],
)
def test_flash_kernel_equals_the_loop(
    topology: Topology, causal: bool, softcap: float | None, window: int | None
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("flash_attn")
    scores = ScoreOptions(0.25, softcap, window, 0.0, causal)
    outputs, gradients = [], []
    for kernel in ("loop", "flash"):
        given = [one.requires_grad_() for one in states(device="cuda", dtype=torch.bfloat16)]
        out = KERNELS[kernel](*given, scores, topology)
        out.float().square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([one.grad.flatten() for one in given if one.grad is not None]))
    assert (outputs[0] - outputs[1]).abs().max() <= 2e-2
    assert (gradients[0] - gradients[1]).abs().max() <= 2e-2 * gradients[0].abs().max()
