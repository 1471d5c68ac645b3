"""What an end-to-end training depends on: all settings but a closed list of those that do not reach its result."""

from dataclasses import asdict
from typing import Any

from nowag_pl.data.tokens import tokens_digest
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import PhasedTrainer, trains_end_to_end
from nowag_pl.lit.stage import data_of

# Options of the Trainer that say where it computes, what it shows, when it validates and where it writes. Devices reach
# the result by the batch size alone, which is entered of all ranks together.
WITHOUT_EFFECT = frozenset(
    {
        *("accelerator", "strategy", "devices", "num_nodes", "plugins", "sync_batchnorm", "use_distributed_sampler"),
        *("logger", "callbacks", "profiler", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),
        *("enable_checkpointing", "enable_autolog_hparams", "model_registry", "default_root_dir", "barebones"),
        *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval"),
        *("check_val_every_n_epoch", "num_sanity_val_steps", "inference_mode", "max_time", "detect_anomaly"),
        *("deterministic", "benchmark", "fast_dev_run"),
    }
)


def training_settings(trainer: PhasedTrainer, module: LitCausalLM) -> dict[str, Any] | None:
    """Return the settings of the end-to-end training as JSON values; None where there is none.

    Args:
        trainer: with its data attached.
        module: what it trains.
    """
    if not trains_end_to_end(trainer):
        return None
    data, objective = data_of(trainer), module.objective
    described: dict[str, Any] = {
        name: value if value is None or isinstance(value, (bool, int, float)) else str(value)
        for name, value in trainer.options.items()
        if name not in WITHOUT_EFFECT
    }
    described |= {"max_epochs": trainer.max_epochs, "precision": str(trainer.precision)}
    described |= module.optimizer_settings.described()
    described |= {"random_init": module.random_init, "objective": type(objective).__name__}
    described |= {f"objective.{name}": value for name, value in objective.settings().items()}
    described["batch_size"] = data.train_batch_size * trainer.world_size
    if module.adapters is not None:
        described |= {f"adapters.{name}": value for name, value in asdict(module.adapters).items()}
    if objective.reads_text:
        described["bos"] = data.bos
        described["tokens_sha256"] = tokens_digest(data.train_windows)
    return described
