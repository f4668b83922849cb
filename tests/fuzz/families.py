"""What is fuzzed: a family builds its samples once, and runs one case from a seeded generator."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from tafkir.errors import TafkirError
from tests.conftest import ROOT
from tests.fuzz.mutation import SCALARS, mutate_bytes, mutate_text, mutate_value, to_json

Case = Callable[[Random], bool]
"""Runs a case; whether the input was refused. What it raises is a fault."""


def _refused(read: Callable[[], Any]) -> bool:
    """Whether reading ends in an error of ours, whose one line can be shown."""
    try:
        read()
    except TafkirError as error:
        if "\n" in str(error):
            raise AssertionError("an error of more than one line") from error
        str(error).encode("utf-8", "backslashreplace")
        return True
    return False


def recipes(folder: Path) -> Case:
    """Recipe files, and values of `--set`."""
    from tafkir.recipe.load import describe_keys, load_recipe
    from tafkir.recipe.show import dump_toml

    samples = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.toml"))]
    samples = sorted(samples, key=len)[:9]
    keys, file = list(describe_keys()), folder / "recipe.toml"
    values = [json.dumps(value) for value in SCALARS if not isinstance(value, str | dict)] + ["", "muon", "[1", "{}"]

    def read(overrides: Sequence[str]) -> None:
        loaded = load_recipe([file], overrides)
        dump_toml(loaded.recipe, loaded.origins)

    def case(random: Random) -> bool:
        sample = random.choice(samples)
        file.write_bytes(mutate_bytes(random, sample, samples) if random.random() < 0.7 else sample)
        chosen = random.choices(keys, k=random.choice((0, 1, 2)))
        return _refused(lambda: read([f"{key}={random.choice(values)}" for key in chosen]))

    return case


def data(folder: Path) -> Case:
    """JSON lines: word problems, preferences, batches of requests, a task's items, chats."""
    from tafkir.data.preference import read_preferences
    from tafkir.data.sources import read_source
    from tafkir.serve.offline import finished_ids, read_batch
    from tafkir.tasks.published.own import load_items

    problem = {"id": "1", "question": "How many?", "answer": "48/2=<<48/2=24>>24\n#### 24", "split": "train"}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: list[tuple[Callable[[Path], Any], Any]] = [
        (read_source, problem),
        (read_source, {"question": "How many?", "answer": 4, "equation": "( 8 - 3 ) * 2"}),
        (read_preferences, pair),
        (read_preferences, {"chosen": chat, "rejected": chat[:1]}),
        (read_preferences, {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
                            "rejected": {"from": "gpt", "value": "c"}}),
        (read_preferences, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
        (read_batch, {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}),
        (lambda path: finished_ids(path, ["1"]), {"custom_id": "1", "response": {}}),
        (lambda path: load_items(str(path), "number").examples("test"), {"question": "1 + 1?", "answer": 2}),
        (lambda path: load_items(str(path), "choice").examples("test"),
         {"question": "1 + 1?", "answer": "B", "options": ["1", "2"]}),
    ]  # fmt: skip
    words = sorted({key for _, row in rows for key in row})
    file = folder / "rows.jsonl"

    def case(random: Random) -> bool:
        read, row = random.choice(rows)
        lines = [to_json(mutate_value(random, row, words)) for _ in range(random.choice((1, 1, 2)))]
        content = b"\n".join([json.dumps(row).encode(), *lines, b""])
        file.write_bytes(mutate_bytes(random, content) if random.random() < 0.3 else content)
        return _refused(lambda: read(file))

    return case


def safetensors(folder: Path) -> Case:
    """Headers of safetensors files."""
    from tafkir.checkpoint.header import layout, read_header

    file = folder / "model.safetensors"
    tensors = [("a.weight", "F32", (2, 3)), ("b", "BF16", (4,)), ("c", "U8", (0, 5)), ("d", "F8_E4M3", (3, 1))]
    head, placed = layout(file, tensors)
    size = sum(tensor.num_bytes for tensor in placed.values())
    header = json.loads(head[8:])
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)

    def case(random: Random) -> bool:
        text = to_json(mutate_value(random, header, ["dtype", "shape", "data_offsets", "__metadata__"]))
        content = len(text).to_bytes(8, "little") + text + bytes(size)
        if random.random() < 0.4:
            content = mutate_bytes(random, head + bytes(size))
        elif random.random() < 0.1:
            content = struct.pack("<Q", random.choice((0, 1, 2**31, 2**63, len(text) + 1))) + content[8:]
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        return _refused(lambda: read_header(file, descriptor))

    return case


def manifests(folder: Path) -> Case:
    """Everything that is JSON in a checkpoint's folder: manifest, config, index."""
    from tafkir.checkpoint.files import fp8_block_size, open_files, read_json, read_manifest
    from tafkir.checkpoint.header import layout
    from tafkir.checkpoint.load import load_config
    from tafkir.checkpoint.quantized import packed_method

    folder = folder / "checkpoint"
    folder.mkdir()
    head, _ = layout(folder / "a", [("a.weight", "F32", (2, 3))])
    (folder / "model-00001-of-00001.safetensors").write_bytes(head + bytes(24))
    entry = {"dtype": "float32", "shape": [2, 3], "sha256": "0" * 64}
    manifest = {"format_version": 1, "architecture": "x", "num_parameters": 6, "num_active_parameters": 6,
                "lineage": {"stage": "sft"}, "tensors": {"a.weight": entry}}  # fmt: skip
    index = {"metadata": {"total_size": 24}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
        "rope_scaling": None, "attention_bias": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    files: dict[str, Any] = {"tafkir.json": manifest, "model.safetensors.index.json": index, "config.json": config}

    def read() -> None:
        read_manifest(folder)
        load_config(folder)
        said = read_json(folder / "config.json")
        packed = packed_method(said, folder)
        with open_files(folder, block_size=fp8_block_size(said, str(folder)), packed=packed):
            pass

    def case(random: Random) -> bool:
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value))
        name = random.choice(list(files))
        content = to_json(mutate_value(random, files[name], list(config)))
        (folder / name).write_bytes(mutate_bytes(random, content) if random.random() < 0.3 else content)
        return _refused(read)

    return case


def requests(folder: Path) -> Case:
    """Bodies of requests, from bytes to what the engine would be asked, or to the answer with a status of 4xx."""
    from tafkir.serve.errors import _validation_error, error_response
    from tafkir.serve.gateway import _text_only
    from tafkir.serve.responses_api import ResponsesRequest
    from tafkir.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, RequestBody, TokenizeRequest
    from tafkir.serve.tools import to_message

    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    chat = {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "temperature": 0.5, "n": 2, "stop": ["a"], "logit_bias": {"5": 1.0}, "max_tokens": 4, "stream": True,
        "stream_options": {"include_usage": True}, "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto", "logprobs": True, "top_logprobs": 2, "enable_thinking": False,
    }  # fmt: skip
    bodies: list[tuple[type[RequestBody], Any]] = [
        (ChatRequest, chat),
        (CompletionRequest, {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, "max_tokens": 2, "n": 1}),
        (CompletionRequest, {"prompt": "a", "structured_outputs": {"json": {"type": "string"}}, "min_p": 0.1}),
        (ResponsesRequest, {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 3,
                            "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}),
        (TokenizeRequest, {"prompt": "a"}),
        (DetokenizeRequest, {"tokens": [1, 2]}),
    ]  # fmt: skip
    words = sorted({name for kind, _ in bodies for name in kind.model_fields})

    def parse(kind: type[RequestBody], body: bytes) -> bool:
        try:
            value = json.loads(_text_only(body))
        except (ValueError, RecursionError):
            return True  # FastAPI's own parser answers 400
        try:
            parsed = kind.model_validate(value)
            if isinstance(parsed, ResponsesRequest):
                parsed = parsed.to_chat()
            if isinstance(parsed, ChatRequest):
                for message in parsed.messages:
                    to_message(message)
        except ValidationError as error:
            answer = error_response(_validation_error(RequestValidationError(error.errors())))
            assert 400 <= answer.status_code < 500
            return True
        except RequestValidationError as error:
            assert 400 <= error_response(_validation_error(error)).status_code < 500
            return True
        return False

    def case(random: Random) -> bool:
        kind, body = random.choice(bodies)
        content = to_json(mutate_value(random, body, words))
        content = mutate_bytes(random, content) if random.random() < 0.2 else content
        return _refused_request(lambda: parse(kind, content))

    return case


def _refused_request(parse: Callable[[], bool]) -> bool:
    from tafkir.serve.errors import error_of

    try:
        return parse()
    except Exception as error:
        if error_of(error).status >= 500:
            raise
        return True


def answers(folder: Path) -> Case:
    """Answers to graders: word problems, competition mathematics, choices, instructions, grids and puzzles."""
    from tafkir.recipe.load import load_recipe
    from tafkir.records import Example
    from tafkir.tasks.catalog import load_task
    from tafkir.tasks.generated import GeneratedTask, generate
    from tafkir.tasks.math import WordProblems
    from tafkir.tasks.mixture import KINDS
    from tafkir.tasks.puzzle_sets import PuzzleSetTask, build_for
    from tafkir.tasks.symbolic import default_verifier

    default_verifier().timeout_s = 1.0  # an answer that takes for ever shall take no longer here
    graders: list[tuple[Any, Example, str]] = []
    for answer in ("24", "1/2", "0.5", "1,234"):
        graders.append((WordProblems(), Example("a", "a", "test", "?", answer), f"so \\boxed{{{answer}}}"))
    tasks: list[Any] = [load_task(name) for name in ("aime24", "aqua", "ifeval", "arc-agi-1", "svamp")]
    few = {"num_train": 1, "num_validation": 1, "num_test": 3}
    for name in ("trm-sudoku4", "trm-maze-small"):
        trm = load_recipe([name]).recipe.trm
        assert trm is not None
        tasks.append(PuzzleSetTask(name, build_for(trm.puzzles.model_copy(update=few), 0)))
    for task in tasks:
        for example in task.examples("test")[:3]:
            graders.append((task, example, f"<think>a</think>The answer is \\boxed{{{example.answer}}}"))
    for answer in ("x^2+1", "\\frac{\\sqrt{2}}{3}", "(1, 2]", "2\\pi"):  # what math-verify has to compare
        example = replace(tasks[0].examples("test")[0], answer=answer)
        graders.append((tasks[0], example, f"so \\boxed{{{answer}}}"))
    for kind in KINDS.values():
        example = generate(kind, 0, 1, "test")
        graders.append((GeneratedTask(kind), example, f"\\boxed{{{example.answer}}}"))
    texts = [text for _, _, text in graders]

    def case(random: Random) -> bool:
        task, example, text = random.choice(graders)
        verdict = task.grade(example, mutate_text(random, text, texts), finished=random.random() < 0.9)
        json.dumps(verdict.reason)
        return verdict.reward < 1

    return case


def grids(folder: Path) -> Case:
    """Puzzles in files and as text, and ARC tasks."""
    from tafkir.data.puzzles.arc import read_tasks
    from tafkir.data.puzzles.files import read_puzzles
    from tafkir.data.puzzles.maze import maze_format
    from tafkir.data.puzzles.sudoku import Box, find_conflict, sudoku_format

    sudoku, maze = sudoku_format(Box(2, 2)), maze_format(5, 5)
    grid = [[1, 0, 0, 4], [0, 0, 1, 0], [0, 1, 0, 0], [4, 0, 0, 1]]
    pair = {"input": [[1, 0], [0, 1]], "output": [[0, 1], [1, 0]]}
    drawn = [{"input": grid, "output": ["1234", "3412", "2143", "4321"]}]
    task = {"id": "a", "train": [pair], "test": [pair]}

    def arc(path: Path) -> Any:
        return read_tasks(str(path))

    samples: dict[str, tuple[Callable[[Path], Any], bytes]] = {
        "puzzles.json": (read_puzzles, to_json(drawn)),
        "puzzles.csv": (read_puzzles, b"source,question,answer\na,1..4..1..1..4..1,1234341221434321\n"),
        "puzzles.txt": (read_puzzles, b"1..4..1..1..4..1\n// a\n4..1\n"),
        "task.json": (arc, to_json(task)),
        "tasks.jsonl": (arc, to_json(task)),
    }

    def text(random: Random) -> bool:
        chosen, drawn = random.choice(((sudoku, "1..4\n..1.\n.1..\n4..1"), (maze, "#####\n#S  #\n### #\n#G  #\n#####")))
        broken = mutate_text(random, drawn)

        def read() -> None:
            cells = chosen.read(broken)
            chosen.show(cells)
            if chosen is sudoku:
                find_conflict([max(0, int(cell) - 1) for cell in cells], Box(2, 2))

        return _refused(read)

    def case(random: Random) -> bool:
        if random.random() < 0.3:
            return text(random)
        name = random.choice(list(samples))
        read, content = samples[name]
        if name.endswith(("json", "jsonl")) and random.random() < 0.6:
            content = to_json(mutate_value(random, json.loads(content), ["input", "output", "train", "test", "id"]))
        else:
            content = mutate_bytes(random, content)
        (folder / name).write_bytes(content)
        return _refused(lambda: read(folder / name))

    return case


FAMILIES: dict[str, Callable[[Path], Case]] = {
    "recipes": recipes, "data": data, "safetensors": safetensors, "manifests": manifests, "requests": requests,
    "answers": answers, "grids": grids,
}  # fmt: skip
