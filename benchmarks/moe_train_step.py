"""Training step (forward, backward, and AdamW unless left out) of our decoder against transformers' Glm4MoeForCausalLM,
on the CPU.

Both hold the same weights and see the same documents, in float32; GLM gets them as a right-padded batch with a
mask, each of its expert backends that fits --max-backend-gb is tried and the fastest is compared. Runs alternate; the
ratio is the median of the pairwise ones. "tiny" is the model of recipes/wordmath-tiny.toml. Tokens are real tokens:
with documents of mixed length GLM also pays for its padding (the share is printed), with equal ones it has none.

    python benchmarks/moe_train_step.py --out benchmarks/results/moe_train_step.json
    python benchmarks/moe_train_step.py --configs tiny 30m 300m --kernels native torch --optimizer with without
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.native.compiled import KernelChoice
from tafkir.ops.loss import IGNORE_INDEX, next_token_loss
from tafkir.ops.native import select_kernels
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig

BACKENDS = ("eager", "batched_mm", "grouped_mm")
CONFIGS = {
    "tiny": load_recipe(["wordmath-tiny"]).recipe.model,
    "30m": ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        moe_intermediate_size=192,
        num_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
    ),
    "300m": ModelConfig(
        vocab_size=16384,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        moe_intermediate_size=256,
        num_experts=64,
        num_experts_per_tok=4,
        n_group=8,
        topk_group=4,
    ),
}
DOCUMENTS = {"tiny": 48, "30m": 16, "300m": 8}


@dataclass(frozen=True)
class Timing:
    """One step's cost."""

    wall_s: float
    cpu_s: float


def document_batch(config: ModelConfig, num_documents: int, lengths_kind: str, seed: int) -> tuple[list[Tensor], int]:
    """Documents of random tokens and their token count: 60 to 190 each, as word problems with solutions, or all 128."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(60, 191, (num_documents,), generator=generator).tolist()
    if lengths_kind == "equal":
        lengths = [128] * num_documents
    documents = [torch.randint(0, config.vocab_size, (length,), generator=generator) for length in lengths]
    return documents, sum(lengths)


class Update:
    """AdamW, the same for both, in its fastest CPU form; or nothing but the dropping of gradients."""

    def __init__(self, module: torch.nn.Module, optimizer: bool) -> None:
        self.module = module
        settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
        self.adamw = torch.optim.AdamW(module.parameters(), **settings) if optimizer else None

    def __call__(self) -> None:
        if self.adamw:
            self.adamw.step()
        self.module.zero_grad()


def our_step(decoder: Decoder, documents: list[Tensor], optimizer: bool = True) -> Callable[[], float]:
    """A training step of the decoder on the flat batch, index building included."""
    update = Update(decoder, optimizer)

    def step() -> float:
        ids = torch.cat(documents)
        bounds = [0]
        for document in documents:
            bounds.append(bounds[-1] + len(document))
        positions = torch.cat([torch.arange(len(document)) for document in documents])
        labels = torch.cat([torch.cat((d[1:], torch.tensor([IGNORE_INDEX]))) for d in documents])
        out = decoder(ids, positions, VarlenCausal(bounds))
        loss = next_token_loss(out.hidden_ND, decoder.head_weight, labels) / (len(ids) - len(documents))
        loss.backward()
        update()
        return loss.item()

    return step


def glm_config(config: ModelConfig) -> Any:
    """The GLM config that computes the same function."""
    from transformers import Glm4MoeConfig

    keys = ModelConfig.model_fields.keys() & inspect.signature(Glm4MoeConfig).parameters.keys()
    keys = (keys | {"head_dim"}) - {"model_type", "attention_bias"}
    return Glm4MoeConfig(
        **{key: getattr(config, key) for key in keys},
        n_routed_experts=config.num_experts,
        n_shared_experts=config.num_shared_experts,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_size / config.head_dim,
        },
        attention_bias=False,
        use_cache=False,
    )


def copy_weights(decoder: Decoder, model: torch.nn.Module) -> None:
    """Our weights into GLM's names, strictly."""
    config = decoder.config
    sizes = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
    state: dict[str, Tensor] = {}
    for ours, tensor in decoder.state_dict().items():
        name = ours if ours.startswith("lm_head") else f"model.{ours}"
        name = name.replace(".attention.", ".self_attn.").replace(".router.", ".gate.")
        name = name.replace("expert_bias", "e_score_correction_bias")
        if "qkv_proj" in name:
            for part, piece in zip("qkv", tensor.split(sizes), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = piece
        elif "gate_up_proj.weight" in name:
            for part, piece in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up_proj", part)] = piece
        else:
            state[name] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)


def glm_step(decoder: Decoder, documents: list[Tensor], backend: str, optimizer: bool = True) -> Callable[[], float]:
    """The same training step by transformers, on a right-padded batch."""
    from transformers import Glm4MoeForCausalLM

    model = Glm4MoeForCausalLM._from_config(glm_config(decoder.config), experts_implementation=backend)
    copy_weights(decoder, model)
    model.train()
    update = Update(model, optimizer)
    pad = torch.nn.utils.rnn.pad_sequence

    def step() -> float:
        ids = pad(documents, batch_first=True)
        mask = pad([torch.ones_like(d) for d in documents], batch_first=True)
        labels = pad(documents, batch_first=True, padding_value=IGNORE_INDEX)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        update()
        return float(loss.item())

    return step


def measure(step: Callable[[], float]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def batched_mm_bytes(config: ModelConfig, documents: list[Tensor]) -> int:
    """What GLM's batched_mm keeps for the backward: a copy of an expert's weights per token-expert pair and layer."""
    pairs = len(documents) * max(map(len, documents)) * config.num_experts_per_tok
    moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    return pairs * 3 * config.moe_intermediate_size * config.hidden_size * 4 * moe_layers


def fastest_backend(
    decoder: Decoder, documents: list[Tensor], max_bytes: float, optimizer: bool
) -> tuple[str, dict[str, str]]:
    """GLM's fastest working expert backend, and what each backend did."""
    notes: dict[str, str] = {}
    best: tuple[float, str] | None = None
    for backend in BACKENDS:
        needed = batched_mm_bytes(decoder.config, documents) if backend == "batched_mm" else 0
        if needed > max_bytes:
            notes[backend] = f"not run: needs {needed / 1e9:.0f} GB"
            continue
        try:
            step = glm_step(decoder, documents, backend, optimizer)
            step()
            cpu_s = min(measure(step).cpu_s for _ in range(2))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            notes[backend] = f"does not run: {str(error).splitlines()[0][:80]}"
            continue
        notes[backend] = f"{cpu_s:.3f} s"
        if best is None or cpu_s < best[0]:
            best = (cpu_s, backend)
    if best is None:
        raise SystemExit(f"no GLM expert backend runs here: {notes}")
    return best[1], notes


def compare(
    name: str, lengths_kind: str, kernels: KernelChoice, optimizer: bool, repeats: int, max_bytes: float
) -> dict[str, Any]:
    """Alternate both and summarise."""
    used = select_kernels(kernels)
    config = CONFIGS[name]
    documents, num_tokens = document_batch(config, DOCUMENTS[name], lengths_kind, seed=0)
    decoder = build_decoder(config, seed=0)
    backend, notes = fastest_backend(decoder, documents, max_bytes, optimizer)
    # A fresh GLM, so that both start from the same weights: equal losses show equal arithmetic.
    theirs = glm_step(decoder, documents, backend, optimizer)
    ours = our_step(decoder, documents, optimizer)
    losses = (ours(), theirs())
    pairs = [(measure(ours), measure(theirs)) for _ in range(repeats)]
    median = statistics.median
    return {
        "config": name,
        "parameters": config.num_parameters(),
        "active_parameters": config.num_parameters(active=True),
        "lengths": lengths_kind,
        "kernels": used,
        "optimizer": optimizer,
        "tokens_per_step": num_tokens,
        "glm_padding_share": 1 - num_tokens / (len(documents) * max(map(len, documents))),
        "first_loss": losses,
        "glm_backend": backend,
        "glm_backends": notes,
        "ours_tokens_per_cpu_s": num_tokens / median(a.cpu_s for a, _ in pairs),
        "glm_tokens_per_cpu_s": num_tokens / median(b.cpu_s for _, b in pairs),
        "ours_tokens_per_s": num_tokens / median(a.wall_s for a, _ in pairs),
        "glm_tokens_per_s": num_tokens / median(b.wall_s for _, b in pairs),
        "ratio_cpu": median(b.cpu_s / a.cpu_s for a, b in pairs),
        "ratio_cpu_range": (min(b.cpu_s / a.cpu_s for a, b in pairs), max(b.cpu_s / a.cpu_s for a, b in pairs)),
        "ratio_wall": median(b.wall_s / a.wall_s for a, b in pairs),
        "pairs": [{"ours": asdict(a), "glm": asdict(b)} for a, b in pairs],
    }


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'config':8}{'lengths':>8}{'kernels':>9}{'AdamW':>7}{'padding':>9}{'params':>9}{'active':>9}"
        f"{'ours tok/cpu-s':>16}{'GLM tok/cpu-s':>15}{'ratio cpu':>11}"
        f"{'(range)':>14}{'ratio wall':>12}  GLM backends"
    ]
    for row in rows:
        low, high = row["ratio_cpu_range"]
        lines.append(
            f"{row['config']:8}{row['lengths']:>8}{row['kernels']:>9}{'yes' if row['optimizer'] else 'no':>7}"
            f"{row['glm_padding_share']:9.0%}"
            f"{row['parameters'] / 1e6:8.2f}M{row['active_parameters'] / 1e6:8.2f}M"
            f"{row['ours_tokens_per_cpu_s']:16.0f}{row['glm_tokens_per_cpu_s']:15.0f}{row['ratio_cpu']:11.2f}"
            f"{f'({low:.2f}-{high:.2f})':>14}{row['ratio_wall']:12.2f}"
            f"  {row['glm_backend']} of {row['glm_backends']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=sorted(CONFIGS), default=["tiny", "30m"])
    parser.add_argument("--lengths", nargs="+", choices=("mixed", "equal"), default=["mixed", "equal"])
    parser.add_argument("--kernels", nargs="+", choices=("auto", "native", "torch"), default=["auto"])
    parser.add_argument(
        "--optimizer", nargs="+", choices=("with", "without"), default=["with"], help="without: forward and backward"
    )
    parser.add_argument("--repeats", type=int, default=7, help="alternating pairs of steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-backend-gb", type=float, default=4, help="leave out GLM backends that need more memory")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        compare(name, lengths_kind, kernels, optimizer == "with", args.repeats, args.max_backend_gb * 1e9)
        for name in args.configs
        for lengths_kind in args.lengths
        for kernels in args.kernels
        for optimizer in args.optimizer
    ]
    result = {
        "benchmark": "moe_train_step",
        "command": " ".join(["python", *sys.argv]),
        "threads": args.threads,
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if not args.json:
        print(render(rows))
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
