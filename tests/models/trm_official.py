"""Numbers of the official TRM and HRM code, to hold ours against: `tests/models/data/trm_official.json`.

    python tests/models/trm_official.py PATH-OF-TinyRecursiveModels

runs the official modules (SamsungSAILMontreal/TinyRecursiveModels at e7b6871, MIT) on the CPU in float32: 16 inference
steps, and three training steps with their gradients, the table of puzzle vectors updated by their sign-SGD; of HRM
(hrm.py there) the gradient of one step's token loss. Weights and inputs come from integers and need not be stored.
"""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

COMMIT = "e7b68717f0a6c4cbb4ce6fbef787b14f42083bd9"
FIXTURE = Path(__file__).parent / "data" / "trm_official.json"

BATCH, CELLS, VOCAB, IDS = 3, 16, 6, 5
NUM_TRAIN_STEPS, NUM_STEPS = 3, 16
PUZZLE_LR, PUZZLE_DECAY = 0.01, 0.1
NUM_SAMPLES = 10
SHOWN_STEPS = (0, 1, 3, 7, 15)

COMMON = {
    "batch_size": BATCH,
    "seq_len": CELLS,
    "num_puzzle_identifiers": IDS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "expansion": 4.0,
    "num_heads": 2,
    "halt_max_steps": NUM_STEPS,
    "halt_exploration_prob": 0.0,
    "forward_dtype": "float32",
    "L_layers": 2,
    "H_layers": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"H_cycles": 3, "L_cycles": 2, "pos_encodings": "rope", "puzzle_emb_len": 2, "puzzle_emb_ndim": 40},
    "learned": {"H_cycles": 2, "L_cycles": 2, "pos_encodings": "learned", "puzzle_emb_len": 1, "puzzle_emb_ndim": 32},
    "mlp": {
        "H_cycles": 2,
        "L_cycles": 3,
        "pos_encodings": "none",
        "mlp_t": True,
        "puzzle_emb_len": 3,
        "puzzle_emb_ndim": 32,
    },
    "no_prefix": {
        "H_cycles": 2,
        "L_cycles": 2,
        "pos_encodings": "none",
        "mlp_t": True,
        "puzzle_emb_len": 0,
        "puzzle_emb_ndim": 0,
    },
    "single": {"H_cycles": 2, "L_cycles": 2, "pos_encodings": "rope", "puzzle_emb_len": 1, "puzzle_emb_ndim": 32},
    "hrm": {"H_cycles": 2, "L_cycles": 2, "pos_encodings": "rope", "puzzle_emb_ndim": 32},
}
MODULES = {"single": "trm_singlez", "hrm": "hrm"}


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in (-1, 1) by splitmix64, the same everywhere."""
    with np.errstate(over="ignore"):
        x = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(seed << 32)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1
    return torch.from_numpy(values.reshape(shape)).float()


def fill(tensors: dict[str, Tensor]) -> None:
    """Weights by the official names: uniform, 0.4 times as large as fresh ones, and a lively q head.

    Fresh mlp networks are chaotic maps (rounding errors grow tenfold in a supervision step); these are not.
    """
    for seed, (name, tensor) in enumerate(sorted(tensors.items()), start=1):
        scale = math.sqrt(3) if tensor.ndim == 1 else 0.4 * math.sqrt(3 / tensor.shape[1])
        tensor.copy_(uniform(seed, *tensor.shape) * (1.0 if "q_head" in name else scale))


def batches() -> list[dict[str, Tensor]]:
    """Inputs, labels (some of them ignored) and puzzle ids of every training step; the last one is for inference."""
    made = []
    for step in range(NUM_TRAIN_STEPS + 1):
        inputs = ((uniform(1000 + step, BATCH, CELLS) + 1) / 2 * VOCAB).long().clamp(0, VOCAB - 1)
        labels = ((uniform(2000 + step, BATCH, CELLS) + 1) / 2 * VOCAB).long().clamp(0, VOCAB - 1)
        labels[uniform(3000 + step, BATCH, CELLS) > 0.6] = -100
        ids = torch.tensor([[1, 4, 1], [0, 1, 2], [3, 3, 4], [2, 4, 0]][step])
        made.append({"inputs": inputs, "labels": labels, "puzzle_identifiers": ids})
    return made


def sample(tensor: Tensor) -> list[float]:
    """The norm of a tensor and some of its entries."""
    flat = tensor.detach().double().flatten()
    places = [(i * 2654435761) % len(flat) for i in range(NUM_SAMPLES)]
    return _short([float(flat.norm()), *(float(flat[place]) for place in places)])


def _short(values: Any) -> Any:
    """Eight digits, which is what float32 has."""
    return json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.8g}"))


def numbers(tensor: Tensor) -> Any:
    """All entries, as JSON has them."""
    return _short(tensor.detach().double().tolist())


def _build(variant: str) -> tuple[Any, Any]:
    from importlib import import_module

    module = import_module(f"models.recursive_reasoning.{MODULES.get(variant, 'trm')}")
    losses = import_module("models.losses")
    kind = next(getattr(module, name) for name in dir(module) if name.endswith("Model_ACTV1"))
    model = kind(COMMON | VARIANTS[variant])
    inner = model.inner
    named = {**dict(inner.named_parameters()), **{n: b for n, b in inner.named_buffers() if not n.startswith("rotary")}}
    with torch.no_grad():
        fill({n: t for n, t in named.items() if "local" not in n})
    return model, losses.ACTLossHead(model, "stablemax_cross_entropy")


def _solve(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    model.eval()
    inner = model.inner
    carry = inner.reset_carry(torch.ones(BATCH, dtype=torch.bool), inner.empty_carry(BATCH))
    logits, q = [], []
    with torch.no_grad():
        for _ in range(NUM_STEPS):
            carry, out, (halt, go_on) = inner(carry, batch)
            logits.append(out)
            q.append(torch.stack((halt, go_on)))
    return {"logits": numbers(torch.stack(logits)[list(SHOWN_STEPS)]), "q": numbers(torch.stack(q))}


def _one_step(model: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The token loss of one supervision step alone: how HRM learns to halt is its own."""
    from models.losses import stablemax_cross_entropy

    model.train()
    inner = model.inner
    carry = inner.reset_carry(torch.ones(BATCH, dtype=torch.bool), inner.empty_carry(BATCH))
    _, logits, _ = inner(carry, batch)
    known = (batch["labels"] != -100).sum(-1, keepdim=True)
    loss = (stablemax_cross_entropy(logits, batch["labels"]) / known).sum() / BATCH
    loss.backward()
    gradients = {n: sample(p.grad) for n, p in inner.named_parameters() if p.grad is not None}
    return [{"loss": loss.item(), "gradients": gradients}]


def _train(model: Any, head: Any, data: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    head.train()
    torch.manual_seed(0)  # the exploration draws, and throws away what it draws
    table = getattr(model.inner, "puzzle_emb", None)
    carry = head.initial_carry(data[0])
    rows = []
    for batch in data[:NUM_TRAIN_STEPS]:
        head.zero_grad()
        if table is not None and table.local_weights.grad is not None:
            table.local_weights.grad = None
        carry, loss, metrics, _, _ = head(return_keys=[], carry=carry, batch=batch)
        (loss / BATCH).backward()
        row = {
            "loss": float(metrics["lm_loss"] / BATCH),
            "q_loss": float(metrics["q_halt_loss"] / BATCH),
            "steps": carry.steps.tolist(),
            "halted": carry.halted.tolist(),
            "gradients": {n: sample(p.grad) for n, p in model.inner.named_parameters() if p.grad is not None},
        }
        if table is not None:
            from models.sparse_embedding import CastedSparseEmbeddingSignSGD_Distributed

            optimizer = CastedSparseEmbeddingSignSGD_Distributed(
                table.buffers(), world_size=1, lr=PUZZLE_LR, weight_decay=PUZZLE_DECAY
            )
            optimizer.step()
            row["puzzle_table"] = sample(table.weights)
        rows.append(row)
    return rows


def main(path: str) -> None:
    sys.path.insert(0, path)
    if "einops" not in sys.modules:
        patterns = {"B S H D -> B H S D", "B H S D -> B S H D"}
        shim = types.ModuleType("einops")
        shim.rearrange = lambda x, how: x.transpose(1, 2).contiguous() if how in patterns else None  # type: ignore[attr-defined]
        sys.modules["einops"] = shim
    data, found = batches(), {}
    for variant in VARIANTS:
        model, head = _build(variant)
        solved = _solve(model, data[-1])
        trained = _one_step(model, data[0]) if variant == "hrm" else _train(model, head, data)
        found[variant] = {"solve": solved, "train": trained}
    source = {"repository": "https://github.com/SamsungSAILMontreal/TinyRecursiveModels", "commit": COMMIT}
    FIXTURE.write_text(json.dumps({**source, "torch": torch.__version__, "variants": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
