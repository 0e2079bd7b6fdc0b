"""Launches of mesa's kernels: keys made ready, the linear systems of all rows, their solution."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention.triton_boundary import boundary_states
from flame.kernels.linear_attention.triton_layout import (
    Items,
    Layout,
    ceil_div,
    item_settings,
    power_of_2,
    precision,
    segment_bounds,
    strides,
)
from flame.kernels.linear_attention.triton_op import as_rows, make_layout
from flame.kernels.linear_attention.triton_scalar_passes import BOUNDARY_ROWS, ChunkSums
from flame.kernels.mesa.triton_keys import finish_keys, prepare_keys
from flame.kernels.mesa.triton_solver import mesa_solve
from flame.kernels.mesa.triton_states import chunk_updates, sum_chunks

CHUNK = 64
# A chunk's iteration ends early where the remaining steps would not show after rounding x to its dtype. (The 1e-5 in the
# steps' denominators makes the last ones many and small.)
TOLERANCE = {torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13, torch.float32: 2.0**-24}


class Keys:
    """Keys [B, T, H, K] as the kernels read them.

    unit: fp16, or fp32 for fp32 values; write: beta times it, in the values' dtype `dtype`.
    """

    def __init__(self, k: Tensor, beta: Tensor, dtype: torch.dtype, normalize: bool) -> None:
        self.k, self.beta, self.dtype, self.normalize = as_rows(k), beta.contiguous(), dtype, normalize
        self.exact = torch.float32 if dtype == torch.float32 else torch.float16
        self.unit = torch.empty(k.shape, dtype=self.exact, device=k.device)
        self.write = torch.empty(k.shape, dtype=dtype, device=k.device)
        prepare_keys[self._grid](
            k_ptr=self.k,
            beta_ptr=self.beta,
            unit_ptr=self.unit,
            write_ptr=self.write,
            **self._settings,
        )

    @property
    def _grid(self) -> tuple[int]:
        return (ceil_div(self.beta.numel(), 16),)

    @property
    def _settings(self) -> dict[str, object]:
        H, K = self.k.shape[2:]
        rows = {"rows": self.beta.numel(), "stride_t": self.k.stride(1), "stride_h": self.k.stride(2)}
        return {**rows, "H": H, "K": K, "BK": power_of_2(K), "BR": 16, "NORMALIZE": self.normalize, "num_warps": 4}

    def into_values(self) -> Tensor:
        """The keys in the values' dtype, in the place of `unit`: for when all systems are solved."""
        self.unit = self.unit.to(self.dtype)
        return self.unit

    def gradient(self, dunit: Tensor, *dwrites: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of k and beta from those of `unit` and, in two parts, of `write`."""
        dk = torch.empty(self.k.shape, dtype=self.k.dtype, device=self.k.device)
        dbeta = torch.empty_like(self.beta)
        finish_keys[self._grid](
            k_ptr=self.k,
            beta_ptr=self.beta,
            dunit_ptr=dunit,
            dwrite_ptr=dwrites[0],
            dwrite2_ptr=dwrites[1],
            dk_ptr=dk,
            dbeta_ptr=dbeta,
            **self._settings,
        )
        return dk, dbeta


class Systems:
    """The matrices of all rows, as the solver reads them: keys, decays, and the states before all chunks."""

    def __init__(
        self,
        keys: Keys,
        log_decay: Tensor,
        key_state: Tensor | None,
        cu_seqlens: Tensor | None,
        final: Tensor | None = None,
    ) -> None:
        B, T, H, K = (int(n) for n in keys.k.shape)
        self.keys = keys
        self.layout = Layout("scalar", B, T, H, K, K, H, 1.0, _chunks(B, T, cu_seqlens))
        self.sums = ChunkSums(self.layout, log_decay.contiguous()).within(CHUNK)
        self.states = torch.empty(self.layout.items.count, H, K, K, dtype=torch.float32, device=keys.k.device)
        self._fill(None if key_state is None else key_state.contiguous(), final)

    def _fill(self, initial: Tensor | None, final: Tensor | None) -> None:
        layout, states, keys = self.layout, self.states, self.keys
        total = torch.empty(states.shape[:2], dtype=torch.float32, device=states.device)
        side, cells = min(64, power_of_2(layout.K)), layout.K * layout.K
        chunk_updates[(ceil_div(layout.K, side) ** 2, layout.items.count * layout.heads)](
            k_ptr=keys.unit,
            beta_ptr=keys.beta,
            sum_ptr=self.sums,
            state_ptr=states,
            total_ptr=total,
            **item_settings(layout, self.sums),
            K=layout.K,
            BK=side,
            BT=CHUNK,
            PRECISION=precision(keys.unit),
            num_warps=4,
        )
        block = min(512, power_of_2(cells))
        sum_chunks[(ceil_div(cells, block), layout.sequences * layout.heads)](
            state_ptr=states,
            total_ptr=total,
            initial_ptr=states if initial is None else initial,
            final_ptr=states if final is None else final,
            first_ptr=total if layout.items.first is None else layout.items.first,
            segments=layout.items.per_row,
            H=layout.heads,
            CELLS=cells,
            BLOCK=block,
            VARLEN=layout.items.starts is not None,
            HAS_INITIAL=initial is not None,
            STORE_FINAL=final is not None,
            num_warps=4,
        )

    def solve(self, q: Tensor, regularizer: Tensor, steps: int, dtype: torch.dtype, normalize: bool) -> Tensor:
        """x [B, T, H, K] in `dtype` with A x = q."""
        x = self._rows(dtype)
        self._launch(as_rows(q), regularizer, x, {"NORMALIZE": normalize}, steps)
        return x

    def solve_gradient(
        self, dx: Tensor, x: Tensor, q: Tensor, regularizer: Tensor, steps: int, normalize: bool, unit_eps: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq of the right-hand sides that were solved for and of q as it was given, and the regularizer's gradient.

        The former may overwrite dx: a program reads its rows before it writes them.
        """
        layout, q, x = self.layout, as_rows(q), as_rows(x)
        packed = layout.items.starts is not None
        dq_unit = dx if dx.is_contiguous() and not packed else self._rows(dx.dtype)
        dq = self._rows(q.dtype) if normalize else dq_unit
        new = torch.zeros if packed else torch.empty  # items may hold no row
        dridge = new(layout.items.count, layout.heads, layout.K, dtype=torch.float32, device=q.device)
        flags = {"NORMALIZE": normalize, "GRADIENT": True, "UNIT_EPS": unit_eps}
        self._launch(
            as_rows(dx), regularizer, dq_unit, flags, steps, other_ptr=x, dridge_ptr=dridge, q_ptr=q, dq_ptr=dq
        )
        return dq_unit, dq, dridge.sum(0).to(regularizer.dtype)

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """[B, T, H, K]; zero where no document may reach."""
        new = torch.empty if self.layout.items.starts is None else torch.zeros
        return new(self.keys.k.shape, dtype=dtype, device=self.keys.k.device)

    def _launch(
        self, right: Tensor, ridge: Tensor, x: Tensor, flags: dict[str, bool], steps: int, **gradient: Tensor
    ) -> None:
        layout, keys = self.layout, self.keys
        pointers = {name: gradient.get(name, x) for name in ("other_ptr", "dridge_ptr", "q_ptr", "dq_ptr")}
        mesa_solve[(layout.items.count * layout.heads,)](
            right_ptr=right,
            k_ptr=keys.unit,
            beta_ptr=keys.beta,
            sum_ptr=self.sums,
            state_ptr=self.states,
            ridge_ptr=ridge.contiguous(),
            x_ptr=x,
            **pointers,
            steps=steps,
            **item_settings(layout, self.sums),
            **strides(r=right, k=keys.unit, q=pointers["q_ptr"]),
            K=layout.K,
            BK=power_of_2(layout.K),
            BT=CHUNK,
            SPLIT=keys.exact == torch.float32,
            TOLERANCE=TOLERANCE[x.dtype],
            **{"UNIT_EPS": False, "GRADIENT": False, **flags},
            **solve_tile(layout.K, keys.dtype, x.device),
        )


def solve_tile(K: int, dtype: torch.dtype, device: torch.device) -> tiles.Tile:
    return tiles.choose("mesa", tiles.key("solve", K=K, dtype=dtype), DEFAULT_TILE, device)


DEFAULT_TILE = {"CHECK": 2, "num_warps": 4, "num_stages": 1}


def _chunks(batch: int, tokens: int, cu_seqlens: Tensor | None) -> Items:
    """Every chunk an item of its own."""
    if cu_seqlens is None:
        per_row = ceil_div(tokens, CHUNK)
        return Items(batch * per_row, CHUNK, per_row)
    bounds = cu_seqlens.to(torch.int32)
    starts, ends, first = segment_bounds(bounds, CHUNK, tokens // CHUNK + bounds.numel() - 1)
    return Items(starts.numel(), CHUNK, 1, starts, ends, first)


def opening_states(
    write: Tensor, values: Tensor, log_decay: Tensor, key_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Key states at the openings of linear attention's own items; empty where it cuts none."""
    layout = make_layout(write, write, values, log_decay, cu_seqlens, "scalar", 1.0)
    if not layout.items.cut:
        return write.new_empty(0, dtype=torch.float32)
    sums = ChunkSums(layout, log_decay.contiguous()).within(BOUNDARY_ROWS)
    initial = None if key_state is None else key_state.contiguous()
    return boundary_states(layout, write, values, sums, rows=BOUNDARY_ROWS, initial=initial)
