"""Windows for calibration, training and evaluation."""

import json

import pytest
import torch
from tiny_models import SEQ_LEN, save_tiny_model

from nowag_pl.data.mixture import TextPart
from nowag_pl.data.sources import HubDataset, read_text_file
from nowag_pl.data.tokens import whole_windows
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.phases import PhasedTrainer
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.checkpoint import Checkpoint

pytest_plugins = ["tiny_fixtures"]


class FakeTrainer(PhasedTrainer):
    """One of several processes."""

    global_rank, world_size, lightning_module = 0, 1, None  # properties of a Trainer

    def __init__(self, module, rank, world_size, compressing):
        self.lightning_module, self.global_rank, self.world_size = module, rank, world_size
        self.compressing = compressing


@pytest.fixture
def datamodule(model_folder, workplace):
    """Make a data module that stands before a trainer of `world_size` processes."""

    def make(rank=0, world_size=1, model=None, compressing=True, **settings):
        settings = {
            "calibration_files": [str(workplace / "calibration.txt")],
            "eval_files": {"held_out": str(workplace / "eval.txt")},
            "seq_len": SEQ_LEN,
            "cache_dir": str(workplace / "cache"),
        } | settings
        module = TokenDataModule(**settings)
        language_model = TextModule()
        language_model.checkpoint = Checkpoint(str(model or model_folder()))
        module.trainer = FakeTrainer(language_model, rank, world_size, compressing)
        module.prepare_data()
        module.setup("validate")
        return module

    return make


def tokens_of(path, checkpoint) -> torch.Tensor:
    tokenizer = checkpoint.tokenizer
    ids = tokenizer(read_text_file(path), add_special_tokens=False)["input_ids"]
    return torch.tensor([tokenizer.bos_token_id, *ids])


def test_evaluation_windows_are_the_text_without_its_tail(datamodule, workplace):
    module = datamodule()
    tokens = tokens_of(workplace / "eval.txt", module.checkpoint)
    windows = module.eval_windows["held_out"]
    assert windows.shape == (len(tokens) // SEQ_LEN, SEQ_LEN)
    assert torch.equal(windows.flatten().long(), tokens[: windows.numel()])
    assert len(tokens) % SEQ_LEN  # there is a tail


def test_every_window_of_a_gemma_begins_with_the_token_and_keeps_the_rest(datamodule, model_folder):
    stream, window = datamodule(), datamodule(model=model_folder("gemma3"))
    assert (stream.bos, window.bos) == ("stream", "window")
    for cut in (
        lambda module: module.eval_windows["held_out"],
        lambda module: module.calibration_windows(5, 0),
        lambda module: module.train_windows,
        lambda module: torch.cat(module.finetuning_windows(3, 2, 0)),
    ):
        assert torch.equal(cut(window)[:, 1:], cut(stream)[:, 1:])
        assert (cut(window)[:, 0] == window.checkpoint.tokenizer.bos_token_id).all()
    assert torch.equal(datamodule(bos="window").train_windows, window.train_windows)
    assert torch.equal(datamodule(bos="stream", model=model_folder("gemma3")).train_windows, stream.train_windows)


def test_token_in_every_window_is_refused_where_the_tokenizer_has_none(datamodule, monkeypatch):
    module = datamodule(bos="window")
    module.checkpoint.tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"beginning-of-sequence token for data\.bos=window, but that of .* has none"):
        module.train_windows  # noqa: B018


def test_files_by_a_string_a_pattern_and_a_folder(datamodule, workplace, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(read_text_file(workplace / "eval.txt"))
    listed = datamodule(calibration_files=[str(tmp_path / "texts" / f"{name}.txt") for name in ("a", "b")])
    for files in (str(tmp_path / "texts"), str(tmp_path / "texts" / "*.txt")):
        module = datamodule(calibration_files=files, eval_files=files)
        assert torch.equal(module.calibration_tokens, listed.calibration_tokens)
        assert module.eval_names == ["texts" if files.endswith("texts") else "text"]
        assert ("data.calibration_files", tmp_path / "texts" / "b.txt") in module.places
    assert datamodule(eval_files={"two": [str(workplace / "eval.txt")] * 2}).eval_names == ["two"]


def test_ranks_see_every_window_once(datamodule):
    seen, windows = [], datamodule().eval_windows["held_out"]
    for rank in range(3):
        (loader,) = datamodule(rank, 3, eval_batch_size=2).val_dataloader()
        for batch in loader:
            assert torch.equal(batch["tokens"], windows[batch["index"]].long())
            seen += batch["index"][batch["weight"] > 0].tolist()
    assert sorted(seen) == list(range(len(windows)))


def test_only_the_first_windows_where_fewer_are_wanted(datamodule):
    whole, few = datamodule(), datamodule(max_eval_windows=3)
    assert torch.equal(few.eval_windows["held_out"], whole.eval_windows["held_out"][:3])


def test_calibration_windows_are_parts_of_the_text(datamodule, workplace):
    module = datamodule()
    tokens = tokens_of(workplace / "calibration.txt", module.checkpoint)
    places = tokens.unfold(0, SEQ_LEN, 1)
    windows = module.calibration_windows(5, seed=0)
    assert windows.shape == (5, SEQ_LEN)
    for window in windows.long():
        assert (places == window).all(dim=1).any()


def test_calibration_windows_follow_the_seed(datamodule):
    module = datamodule()
    assert torch.equal(module.calibration_windows(5, 0), datamodule().calibration_windows(5, 0))
    assert not torch.equal(module.calibration_windows(5, 0), module.calibration_windows(5, 1))


def test_calibration_windows_are_the_same_on_every_rank(datamodule):
    assert torch.equal(datamodule(0, 2).calibration_windows(5, 0), datamodule(1, 2).calibration_windows(5, 0))


def test_several_texts_keep_their_names_and_order(datamodule, workplace):
    files = {"second": str(workplace / "calibration.txt"), "first": str(workplace / "eval.txt")}
    module = datamodule(eval_files=files)
    assert module.eval_names == ["second", "first"]
    assert list(module.eval_windows) == ["second", "first"]
    sizes = [sum(len(batch["index"]) for batch in loader) for loader in module.val_dataloader()]
    assert sizes == [len(module.eval_windows["second"]), len(module.eval_windows["first"])]


@pytest.fixture
def hub(monkeypatch):
    """Let every dataset of the hub hold texts that name its split, and tell which are opened."""
    opened = []

    def documents(self):
        opened.append(self)
        return [f"the {self.split} block of row {i} " * 9 for i in range(1100)]

    monkeypatch.setattr(HubDataset, "documents", documents)
    return opened


def test_each_text_is_cut_by_its_own_protocol(datamodule, hub, tmp_path):
    names = {"stream": "stream", "c4": "c4", "c4-new": "c4-new"}
    sources = {name: HubDataset("a/b", protocol=protocol) for name, protocol in names.items()}
    module = datamodule(eval_files=None, eval_datasets=sources, cache_dir=str(tmp_path))
    assert module.eval_names == list(names)
    windows = module.eval_windows
    assert [len(windows[name]) for name in ("c4", "c4-new")] == [256, 256]
    assert len(windows["stream"]) > 256
    assert not torch.equal(windows["c4"], windows["c4-new"])
    assert not torch.equal(windows["stream"][:256], windows["c4-new"])
    assert hub == list(sources.values())


def test_hub_texts_are_opened_by_the_first_rank_only(datamodule, hub, tmp_path):
    settings = {
        "calibration_files": None,
        "calibration_dataset": HubDataset("a/b"),
        "eval_files": None,
        "eval_datasets": {"held_out": HubDataset("a/b", split="test")},
        "cache_dir": str(tmp_path / "cache"),
    }
    first = datamodule(0, 2, **settings)
    assert len(hub) == 2
    second = datamodule(1, 2, **settings)
    assert torch.equal(first.calibration_windows(5, 0), second.calibration_windows(5, 0))
    assert torch.equal(first.eval_windows["held_out"], second.eval_windows["held_out"])
    assert len(hub) == 2


@pytest.mark.parametrize(("world_size", "compressing"), [(1, True), (2, False)])
def test_calibration_text_is_not_opened_before_it_is_needed(world_size, compressing, datamodule, hub, tmp_path):
    calibration = {"calibration_files": None, "calibration_dataset": HubDataset("a/b"), "cache_dir": str(tmp_path)}
    module = datamodule(0, world_size, compressing=compressing, **calibration)
    assert hub == []
    module.calibration_windows(1, 0)
    assert hub == [HubDataset("a/b")]


def test_files_of_rows_are_read_by_their_suffix(datamodule, workplace, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    texts = [read_text_file(workplace / "eval.txt"), "the block"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "joined.txt").write_text("\n\n".join(texts))
    files = {kind: str(tmp_path / kind) for kind in ("rows.jsonl", "joined.txt")}
    module = datamodule(eval_files=files, calibration_files=[files["rows.jsonl"]])
    assert torch.equal(module.eval_windows["rows.jsonl"], module.eval_windows["joined.txt"])
    assert torch.equal(module.calibration_tokens, tokens_of(tmp_path / "joined.txt", module.checkpoint).int())


def test_error_names_the_option(datamodule):
    with pytest.raises(ValueError, match=r"^data\.eval_files\.mine: Expected no\.jsonl to be a readable"):
        datamodule(eval_files={"mine": "no.jsonl"})
    with pytest.raises(ValueError, match=r"^data\.eval_datasets\.mine: Could not open dataset 'json'"):
        datamodule(eval_datasets={"mine": HubDataset("json", data_files="no.jsonl")})
    module = datamodule(calibration_files=["no.txt"])
    with pytest.raises(ValueError, match=r"^data\.calibration_files: Expected no\.txt to be a readable"):
        module.calibration_windows(1, 0)


def test_training_batches_are_windows_of_the_calibration_text(datamodule):
    module = datamodule(train_batch_size=3)
    batches = list(module.train_dataloader())
    windows = whole_windows(module.calibration_tokens, SEQ_LEN).long()
    assert len(windows) % 3
    assert [len(batch["tokens"]) for batch in batches] == [3] * (len(windows) // 3) + [len(windows) % 3]
    for batch in batches:
        assert torch.equal(batch["tokens"], windows[batch["index"]])
        assert float(batch["weight"].sum()) == pytest.approx(1)
    order = torch.cat([batch["index"] for batch in batches]).tolist()
    assert sorted(order) == list(range(len(windows)))
    assert order != sorted(order)


def test_training_on_the_first_windows_only(datamodule):
    module = datamodule(train_batch_size=4, max_train_windows=6)
    assert sorted(torch.cat([batch["index"] for batch in module.train_dataloader()]).tolist()) == list(range(6))


def test_sequences_to_train_on_and_to_hold_out_do_not_overlap(datamodule):
    module = datamodule()
    train, held_out = module.finetuning_windows(9, 3, seed=0)
    assert (train.shape, held_out.shape) == ((9, SEQ_LEN), (3, SEQ_LEN))
    tokens, cut = module.calibration_tokens, len(module.calibration_tokens) * 9 // 12
    for windows, part in ((train, tokens[:cut]), (held_out, tokens[cut:])):
        places = part.unfold(0, SEQ_LEN, 1)
        assert all((places == window).all(dim=1).any() for window in windows)


def test_text_too_short_to_hold_out_is_refused(datamodule, tmp_path):
    (tmp_path / "short.txt").write_text("of the model")
    module = datamodule(calibration_files=[str(tmp_path / "short.txt")])
    with pytest.raises(ValueError, match="at least two windows of 32 tokens to finetune on"):
        module.finetuning_windows(1, 1, seed=0)


def test_length_defaults_to_the_models_context(datamodule):
    assert datamodule(seq_len=None).seq_len == 64


def test_length_defaults_to_2048_under_a_longer_context(datamodule, tmp_path, workplace):
    folder = save_tiny_model(tmp_path / "long", max_position_embeddings=8192)
    long = {"calibration_files": [str(workplace / "calibration.txt")] * 3, "eval_files": {"long": ""}}
    long["eval_files"] = {"long": str(tmp_path / "long.txt")}
    (tmp_path / "long.txt").write_text(read_text_file(workplace / "calibration.txt") * 3)
    assert datamodule(model=folder, seq_len=None, **long).seq_len == 2048


def test_length_over_the_context_is_refused(datamodule):
    with pytest.raises(ValueError, match=r"at most 64.*got 65"):
        datamodule(seq_len=65)


def test_files_and_dataset_together_are_refused(workplace):
    with pytest.raises(ValueError, match=r"calibration_files or data\.calibration_dataset"):
        TokenDataModule(calibration_files=["a"], calibration_dataset=HubDataset("b"))


def test_calibration_by_a_protocol_for_evaluation_is_refused():
    with pytest.raises(ValueError, match=r"calibration_dataset\.protocol to be 'stream', but got 'c4'"):
        TokenDataModule(calibration_dataset=HubDataset("b", protocol="c4"))


def test_one_name_for_two_texts_is_refused():
    with pytest.raises(ValueError, match=r"data\.eval_files or data\.eval_datasets, but got 'c4' in both"):
        TokenDataModule(eval_files={"c4": "a.txt"}, eval_datasets={"c4": HubDataset("b")})


@pytest.mark.parametrize(
    "name",
    ["seq_len", "eval_batch_size", "eval_chunk_mib", "train_batch_size", "max_train_windows", "max_eval_windows"],
)
def test_numbers_below_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"data.{name} of at least"):
        TokenDataModule(**{name: 0})


def test_one_token_predicts_nothing():
    with pytest.raises(ValueError, match=r"data\.seq_len of at least 2"):
        TokenDataModule(seq_len=1)


def test_calibration_text_is_mixed_of_its_parts(datamodule, workplace, tmp_path):
    rows = [{"body": f"row {number} of a table, a b c d e f"} for number in range(200)]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    parts = [
        TextPart(str(workplace / "calibration.txt"), share=3.0),
        TextPart(dataset=HubDataset(str(table), column="body"), share=1.0, length=SEQ_LEN // 2),
    ]
    module = datamodule(calibration_files=None, calibration_mixture=parts)
    tokens = module.calibration_tokens
    whole = tokens_of(workplace / "calibration.txt", module.checkpoint)
    assert torch.equal(tokens[:SEQ_LEN], whole[:SEQ_LEN].int())
    of_table = datamodule(calibration_files=[str(table)], column="body").calibration_tokens
    assert torch.equal(tokens[SEQ_LEN : SEQ_LEN + SEQ_LEN // 2], of_table[: SEQ_LEN // 2])
    assert module.places[0] == ("data.calibration_mixture", workplace / "calibration.txt")
    for more in ({"calibration_files": [str(table)]}, {"calibration_files": None, "python_packages": ["rich"]}):
        with pytest.raises(ValueError, match="calibration_mixture alone"):
            datamodule(calibration_mixture=parts, **more)
