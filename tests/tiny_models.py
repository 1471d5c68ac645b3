"""Tiny random models of the supported families, texts for them, and ways to call the command line."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nowag_pl.files import read_tensors
from nowag_pl.models.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "nowag_pl" / "assets" / "embedded"
_SPECIFICS: dict[str, tuple[str, dict[str, Any]]] = {  # beginning of the classes' names, settings
    "llama": ("Llama", {}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    ),
    "phi3": (
        "Phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 4.0, 8.0],
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "granitemoe": (
        "GraniteMoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "residual_multiplier": 0.5},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "head_dim": 8,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_nextn_predict_layers": 0,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 16,
            "intermediate_size_mlp": 24,
            "interleave_moe_layer_step": 2,
            "head_dim": 8,
            "attention_chunk_size": 16,
            "no_rope_layer_interval": 2,
        },
    ),
}
EXPERT_FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "gpt_oss",
    "deepseek_v3",
    "llama4",
]
FAMILIES = [family for family in _SPECIFICS if family not in EXPERT_FAMILIES]
VOCABULARY = 2048
SEQ_LEN = 32
HARD_TIMEOUT = 120


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    sharded: bool = False,
    num_blocks: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a random model with its tokenizer. Every stored tensor is random, also norms and biases."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    name, specifics = _SPECIFICS[family]
    text = "Text" if family in ("gemma3", "llama4") else ""  # beside the multimodal one
    config = getattr(transformers, f"{name}{text}Config")(**settings | specifics | overrides)
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
        # Those that are stored, such as the bias of a router.
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.normal_(0, 0.1)
    torch.set_rng_state(torch_state)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


def edit_tensors(folder: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """Replace tensors of a single-file model, or drop those that are None."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, metadata)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copy_model(source: Path, folder: Path) -> Path:
    """Copy a model folder, so that a test can damage it."""
    shutil.copytree(source, folder)
    return folder


def load_whole(folder: Path, **settings: Any) -> nn.Module:
    """Load a model with transformers alone: the oracle."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def random_tokens(num_sequences: int, seq_len: int = SEQ_LEN, seed: int = 0) -> Tensor:
    """Return token ids `[num_sequences, seq_len]`."""
    return torch.randint(2, VOCABULARY, (num_sequences, seq_len), generator=torch.Generator().manual_seed(seed))


def num_linears(folder: Path) -> int:
    """Return how many linears the blocks of a tiny model have."""
    return 7 * Checkpoint(str(folder)).config.num_hidden_layers


def write_text(path: Path, num_words: int, seed: int) -> Path:
    """Write text of random English words."""
    words = ["the", "of", "model", "and", "weight", "in", "is", "block", "matrix", "row", "column", "class", "returns"]
    chosen = random.Random(seed).choices(words, k=num_words)
    path.write_text(" ".join(chosen), encoding="utf-8")
    return path


def fit_arguments(workplace: Path, model: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the arguments of a `fit` of a few seconds; later ones win."""
    return _arguments("fit", workplace, model, run_dir, "--calibration.num_sequences=6", *more)


def validate_arguments(workplace: Path, model: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the arguments of a `validate` on the same text as `fit_arguments`."""
    return _arguments("validate", workplace, model, run_dir, *more)


def _arguments(command: str, workplace: Path, model: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        command,
        f"--model.path={model}",
        f"--run_dir={run_dir}",
        f"--data.calibration_files=[{workplace / 'calibration.txt'}]",
        f"--data.eval_files={json.dumps({'held_out': str(workplace / 'eval.txt')})}",
        f"--data.seq_len={SEQ_LEN}",
        f"--data.cache_dir={workplace / 'cache'}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--inspection.enabled=false",  # seconds that only their own tests need
        "--report.html=false",
        "--report.prompts=[]",
        *more,
    ]


class Outcome:
    """What a command gave: exit code, the error that it ended with, and what it printed."""

    def __init__(self, code: int, message: str, output: str = "") -> None:
        self.code = code
        self.message = message.removeprefix("error: ").partition("\n(NOWAG_PL_TRACEBACK")[0].strip()
        self.output = output


def call(arguments: Sequence[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Run `python main.py` inside this process: same code from the first line to the exit code, no start-up time.

    An exception that main.py lets through, which a user would see as a traceback, is raised.
    """
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
    capfd.readouterr()
    code: Any = 0
    said = ""
    try:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code or 0
        if isinstance(code, str):  # what the interpreter does with it
            said, code = code, 1
    captured = capfd.readouterr()
    return Outcome(code, said or captured.err, captured.out)


def subprocess_environment() -> dict[str, str]:
    """Return an environment without this process's own Lightning settings."""
    own = ("PL_", "NOWAG", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}


def start(arguments: Sequence[str], log: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start `python main.py` in its own process group; what it says goes to `log`. It sees no GPU unless told."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *map(str, arguments)],
            cwd=log.parent,
            env=subprocess_environment() | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: "subprocess.Popen[bytes]", log: Path, timeout: float = HARD_TIMEOUT) -> str:
    """Wait for a started command and return what it said; it must succeed in time."""
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    said = log.read_text()
    assert code == 0, said[-3000:]
    return said


def artefacts(run_dir: Path) -> dict[str, tuple[dict[str, bytes], dict[str, Any]]]:
    """Return bytes of every tensor and the metadata of every artefact, without times."""
    found = {}
    for file in sorted(run_dir.glob("*/*.safetensors")):
        if file.parent.name == "export":
            continue
        tensors, metadata = read_tensors(file)
        metadata.pop("seconds", None)
        content = {
            f"{name} {tensor.dtype} {tuple(tensor.shape)}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
            for name, tensor in tensors.items()
        }
        found[f"{file.parent.name}/{file.name}"] = (content, metadata)
    for file in sorted(run_dir.glob("*/*.npy")):
        found[f"{file.parent.name}/{file.name}"] = ({"array": file.read_bytes()}, {})
    return found
