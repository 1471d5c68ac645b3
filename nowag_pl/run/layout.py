"""Where everything lies in a run directory."""

from pathlib import Path

# Stages that write one artefact per block, by the name of their folder.
GUIDANCE = "guidance"
OUTPUT_MOMENTS = "output_moments"  # of gradients, for feedback along both sides
MOMENTS = "moments"
COMPRESSED = "compressed"
FINETUNED = "finetuned"
BUDGET = "budget"
HEAD = "head"  # the compressed head, as if it were the only block
ROTATION = "rotation"
ROTATION_MOMENTS = f"{ROTATION}/moments"
CANDIDATES = f"{BUDGET}/candidates"
SENSITIVITIES = f"{BUDGET}/sensitivity"

TRIALS = f"{BUDGET}/trials"  # whole models that the budget compares
DECISION = f"{BUDGET}/decision.json"
ROTATION_MATRIX = f"{ROTATION}/stream.safetensors"
ROTATED_MODEL = f"{ROTATION}/model"  # what is compressed in the place of the dense model
MANIFEST = "manifest.json"
LOCK = ".lock"
REFERENCE = "reference"  # the dense model's predictions
HIDDEN = f"{FINETUNED}/hidden"  # hidden states, while blocks are finetuned
BLOCK_CHECKPOINTS = f"{FINETUNED}/checkpoints"
LOGS = "logs"  # of each process, where there are several
TRAINING = "training"
CHECKPOINT = f"{TRAINING}/last.ckpt"  # where end-to-end training stands
EXPORT = "export"
FINETUNED_EXPORT = "export_finetuned"
REPORT = "report.json"
PAGE = "report.html"
EVALUATION = "evaluation.json"


def block_folder(index: int) -> str:
    """Return the name of what belongs to a block, such as "block_003"."""
    return f"block_{index:03d}"


def artefact(folder: Path, stage: str, index: int) -> Path:
    """Return the file of a stage and block."""
    return folder / stage / f"{block_folder(index)}.safetensors"


def written_folders(folder: Path) -> list[Path]:
    """Return the folders of a run directory in which its process writes, those that are there."""
    folders = [
        folder,
        *(
            folder / name
            for name in (GUIDANCE, OUTPUT_MOMENTS, MOMENTS, HEAD, COMPRESSED, FINETUNED, HIDDEN, REFERENCE)
        ),
    ]
    folders += [folder / ROTATION, folder / ROTATION_MOMENTS, folder / ROTATED_MODEL]
    folders.append(folder / TRAINING)
    for name in (BUDGET, EXPORT, FINETUNED_EXPORT):
        folders += [folder / name, *(folder / name).rglob("*")]
    folders += (folder / BLOCK_CHECKPOINTS).glob("block_*")
    return [each for each in folders if each.is_dir()]
