import json
import os
import shutil
from copy import deepcopy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ldm.errors import LdmError, UsageError
from ldm.models import text_encoder as text
from ldm.models.text_encoder import MAX_TOKENS, TextEncoder, TextEncoderConfig, always_mask, embed, max_tokens, minilm_folder

CAPTIONS = ["a red circle", "a tiny yellow star at the top left on a dark blue background", "", "cat"]
WORDS = ["[PAD]", "[UNK]", "[START]", "[END]", "a", "red", "green", "ring", "on", "black"]
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_minilm_is_a_real_encoder_of_384_features(minilm):
    embeddings, mask = minilm.encode(CAPTIONS)
    assert minilm.width == 384 and embeddings.shape == (*mask.shape, 384) and embeddings.dtype == torch.float32
    assert mask.sum(1).tolist() == [len(minilm.tokenizer(caption)["input_ids"]) for caption in CAPTIONS]
    assert not minilm.model.training and not any(p.requires_grad for p in minilm.model.parameters())
    assert not embeddings.requires_grad and not embeddings.is_inference()


def test_minilm_knows_what_words_mean(minilm):
    embeddings, mask = minilm.encode(["a red circle", "a round crimson disc", "stock prices fell sharply"])
    pooled = torch.nn.functional.normalize(embeddings.sum(1) / mask.sum(1, keepdim=True), dim=1)
    alike, unlike = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert alike > unlike + 0.2


def test_minilm_whose_weights_are_not_the_published_ones_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "tampered_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    data = bytearray((minilm_folder() / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (package / "model" / "model.safetensors").write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(text, "MINILM_PACKAGE", "tampered_minilm")
    with pytest.raises(LdmError, match=r"model.safetensors is not the file that was published"):
        minilm_folder()
    monkeypatch.setattr(text, "MINILM_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UsageError, match=r"pip install 'ldm\[quickstart\]'.*directory of another encoder"):
        TextEncoder.load("minilm")


def test_a_caption_s_embedding_does_not_depend_on_its_batch(minilm):
    together, mask = minilm.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone, one = minilm.encode([caption])
        length = one.shape[1]
        assert mask[row].sum() == length and one.all()
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)
        assert not together[row, length:].any()  # zeroed padding


def test_a_caption_is_cut_at_the_encoder_s_limit(minilm):
    limit = max_tokens(minilm.tokenizer)
    assert limit <= minilm.model.config.max_position_embeddings
    embeddings, mask = minilm.encode(["circle " * 2 * limit])
    assert embeddings.shape[1] == mask.sum() == limit


def test_max_tokens_follows_the_tokenizer_within_reason():
    assert max_tokens(tokenizer(model_max_length=77)) == 77
    assert max_tokens(tokenizer(model_max_length=8192)) == 512
    assert max_tokens(tokenizer()) == MAX_TOKENS  # states no limit


def test_the_hash_depends_on_the_weights(minilm, tmp_path):
    save(tmp_path / "a", bert(0))
    save(tmp_path / "b", bert(1))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    a, b, copy = (TextEncoder.load(str(tmp_path / name)) for name in ("a", "b", "copy"))
    assert a.hash == copy.hash and len({a.hash, b.hash, minilm.hash}) == 3


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-model", "without-weights"])
def test_an_encoder_that_cannot_be_loaded_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert(0).config.save_pretrained("without-weights")
    tokenizer().save_pretrained("without-weights")
    with pytest.raises(UsageError) as error:
        TextEncoder.load(name)
    message = str(error.value)
    assert repr(name) in message and "\n" not in message and "'minilm'" in message


def tokenizer(**settings):
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[START] $A [END]", special_tokens=[("[START]", 2), ("[END]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", **settings)


def bert(seed):
    torch.manual_seed(seed)
    return BertModel(BertConfig(vocab_size=len(WORDS), **SIZES))


def clip(seed):
    torch.manual_seed(seed)
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=20, eos_token_id=3, **SIZES))


def t5(seed):
    torch.manual_seed(seed)
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def save(folder, model):
    model.save_pretrained(folder)
    tokenizer(model_max_length=20).save_pretrained(folder)


@pytest.mark.parametrize("make", [bert, clip, t5])
def test_encoders_of_several_families_load_from_their_folder(make, tmp_path):
    model = make(0).eval()
    save(tmp_path, model)
    encoder = TextEncoder.load(str(tmp_path))
    assert (
        type(encoder.model) is type(model)
        and encoder.width == 16
        and (encoder.name, encoder.folder) == (tmp_path.name, tmp_path)
    )
    embeddings, mask = encoder.encode(["a red ring", "a green ring on a black", "red"])
    assert embeddings.shape == (3, 8, 16) and mask.sum(1).tolist() == [5, 8, 3]
    ids = torch.tensor([[2, 4, 5, 7, 3]])  # [START] a red ring [END]
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(embeddings[:1, :5], alone, rtol=1e-4, atol=1e-5)
    assert not embeddings[0, 5:].any()


@pytest.mark.parametrize("place", [".", "text_encoder"])
def test_the_text_encoder_of_a_pipeline_is_used_with_its_tokenizer(tmp_path, place, caplog):
    bert(0).save_pretrained(tmp_path / "text_encoder")
    tokenizer(model_max_length=20).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    encoder = TextEncoder.load(str(tmp_path / place))
    assert encoder.encode(["a red ring"])[0].shape == (1, 5, 16)
    assert ("is a pipeline, its text encoder" in caplog.text) == (place == ".")


@pytest.mark.parametrize("sharded", [False, True])
def test_half_precision_weights_alone_are_used_in_full_precision(tmp_path, sharded, caplog):
    save(tmp_path, bert(0).half())
    expected = TextEncoder.load(str(tmp_path)).model.float()
    (tmp_path / "model.safetensors").unlink()
    bert(0).half().save_pretrained(tmp_path, variant="fp16", max_shard_size="4KB" if sharded else "1GB")
    assert not (tmp_path / "model.safetensors").exists()
    model = TextEncoder.load(str(tmp_path)).model
    assert model.dtype == torch.float32 and "variant fp16 alone" in caplog.text
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_its_weights_are_its_own_whatever_becomes_of_the_file(tmp_path):
    """Mapped into memory, they would change with the file, and a shorter file would end the process."""
    save(tmp_path, bert(0))
    encoder = TextEncoder.load(str(tmp_path))
    before = encoder.encode(["a red ring"])[0]
    os.truncate(tmp_path / "model.safetensors", 10)
    assert torch.equal(encoder.encode(["a red ring"])[0], before)


BROKEN = {
    "no JSON": (b"{", "config.json is not readable JSON"),
    "a list": (b"[]", "config.json"),
    "no type": (b"{}", "cannot be loaded"),
    "deep": (b"[" * 100_000, "config.json is not readable JSON"),
    "layers without bound": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, above the limit of 1,000"),
    "positions without bound": (
        {"max_position_embeddings": 10**12},
        "max_position_embeddings is 1000000000000, above",
    ),
    "width without bound": ({"hidden_size": 10**9}, "hidden_size is 1000000000, above the limit"),
    "no heads": ({"num_attention_heads": 0}, "cannot be loaded"),
    "a text for a number": ({"hidden_size": "16"}, "cannot be loaded"),
    "null": ({"intermediate_size": None}, "cannot be loaded"),
    "a negative width": ({"hidden_size": -16}, "cannot be loaded"),
    "a list for a name": ({"model_type": ["bert"]}, "cannot be loaded"),
    "code of its own": ({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, "cannot be loaded"),
    "heads without bound": ({"num_attention_heads": 10**6}, "num_attention_heads is 1000000, above the limit of 1,000"),
    "negative heads": ({"num_attention_heads": -1}, "cannot be loaded"),
    "another vocabulary": ({"vocab_size": 5}, "cannot be loaded"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_configs_are_one_line(tmp_path, broken):
    save(tmp_path, bert(0))
    change, expected = BROKEN[broken]
    config = tmp_path / "config.json"
    config.write_bytes(change if isinstance(change, bytes) else json.dumps(json.loads(config.read_text()) | change).encode())
    with pytest.raises(LdmError, match=expected) as error:
        TextEncoder.load(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"])
def test_pipes_among_its_files_do_not_block(tmp_path, name):
    save(tmp_path, bert(0))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(LdmError, match=f"{name} is a named pipe; restore the directory"):
        TextEncoder.load(str(tmp_path))


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    save(tmp_path, BertModel(BertConfig(vocab_size=5, **SIZES)))
    with pytest.raises(LdmError, match="the tokenizer gives token 7, but the text encoder has 5"):
        TextEncoder.load(str(tmp_path)).encode(["a red ring"])


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    save(tmp_path, bert(0))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": None}))
    with pytest.raises(LdmError, match="cannot be loaded"):
        TextEncoder.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["bert", "clip", "t5"])
def test_an_encoder_that_always_masks_computes_the_same_and_reads_nothing_from_the_device(kind):
    torch.manual_seed(0)
    model = {
        "bert": lambda: BertModel(BertConfig(vocab_size=50, **SIZES)),
        "clip": lambda: CLIPTextModel(CLIPTextConfig(vocab_size=50, eos_token_id=3, bos_token_id=1, pad_token_id=0, **SIZES)),
        "t5": lambda: T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    }[kind]().eval()
    ids = torch.randint(4, 50, (3, 7))
    masks = torch.ones_like(ids), (torch.arange(7) < torch.tensor([[7], [2], [5]])).long()

    def call_on_meta():
        """On the meta device, from which no value can be read."""
        copy = deepcopy(model).to("meta")
        copy(input_ids=ids.to("meta"), attention_mask=masks[1].to("meta"))

    config, expected = model.config.to_dict(), [embed(model, ids, mask)[0] for mask in masks]
    if kind == "bert":
        with pytest.raises(RuntimeError, match="meta"):
            call_on_meta()
    always_mask(model)
    call_on_meta()
    assert model.config.to_dict() == config
    for mask, embeddings in zip(masks, expected, strict=True):
        torch.testing.assert_close(embed(model, ids, mask)[0], embeddings, rtol=1e-5, atol=1e-6)


def test_another_layer_a_prefix_and_a_length_are_part_of_the_encoder(tmp_path):
    torch.manual_seed(0)
    sizes = dict[str, Any](SIZES, num_hidden_layers=3, vocab_size=len(WORDS), max_position_embeddings=20, eos_token_id=3)
    made = CLIPTextModel(CLIPTextConfig(**sizes)).eval()
    save(tmp_path / "clip", made)
    name, plain = str(tmp_path / "clip"), TextEncoder.load(str(tmp_path / "clip"))
    encoder = TextEncoder.load(TextEncoderConfig(name, layer=-2, prefix="a green", max_tokens=4))
    embeddings, mask = encoder.encode(["a red ring", "red", ""])
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]] and not embeddings[2, 2:].any()
    ids = torch.tensor([plain.tokenizer("a green red").input_ids])  # [START] a green red [END]
    with torch.no_grad():
        hidden = made(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(embeddings[1, :3], hidden[0, [0, 3, 4]], rtol=1e-4, atol=1e-5)
    # saved as a pipeline saves it, it reads its output in the same way
    save_to = str(tmp_path / "again")
    encoder.model.save_pretrained(save_to)
    encoder.tokenizer.save_pretrained(save_to)
    again = TextEncoder.load(save_to)
    assert torch.equal(again.encode(["a red ring", "red", ""])[0], embeddings) and again.hash == encoder.hash
    configs = TextEncoderConfig(name, layer=-1), TextEncoderConfig(name, prefix="a", max_tokens=9)
    assert len({plain.hash, again.hash, *(TextEncoder.load(config).hash for config in configs)}) == 4
    for config, message in (
        (TextEncoderConfig(name, layer=9), "layer is 9, but the text encoder has 4 hidden states"),
        (TextEncoderConfig(name, max_tokens=513), "max_tokens is 513; give 1 to 512"),
        (TextEncoderConfig(name, prefix="a " * 10), "cannot be loaded"),  # 20 positions are too few
    ):
        with pytest.raises(UsageError, match=message):
            TextEncoder.load(config)


def test_a_tokenizer_without_special_tokens_gets_its_end_of_text(tmp_path):
    words = tokenizer(eos_token="[END]", padding_side="left")
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    encoder = TextEncoder(words, gpt(), "gpt")
    embeddings, mask = encoder.encode(["", "a red ring"])
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]] and encoder.tokenize(["a red"]) == [[4, 5, 3]]
    torch.testing.assert_close(embeddings[:1, :1], encoder.encode([""])[0])


def gpt():
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=len(WORDS), n_positions=20, n_embd=16, n_layer=1, n_head=2)).eval()


def test_class_names_are_one_hot_and_none_is_the_same_for_all(tmp_path):
    (tmp_path / "classes.txt").write_text("golden retriever\nring\n\ncat\n")
    encoder = TextEncoder.load(str(tmp_path / "classes.txt"))
    assert (encoder.name, encoder.folder, encoder.width) == ("classes.txt", tmp_path / "classes.txt", 4)
    embeddings, mask = encoder.encode(["cat", "golden retriever", ""])
    assert mask.tolist() == [[1, 1], [1, 1], [1, 0]]
    assert (embeddings != 0).tolist() == (torch.eye(4)[torch.tensor([[0, 3], [0, 1], [0, 0]])] * mask[..., None] != 0).tolist()
    with pytest.raises(UsageError, match="'dog' is no class that is known; give one of: golden retriever, ring, cat"):
        encoder.encode(["dog"])
    encoder.model.save_pretrained(tmp_path / "saved")
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    again = TextEncoder.load(str(tmp_path / "saved"))
    assert again.hash == encoder.hash and again.classes == encoder.classes != [] and not again.is_unconditional
    nothing = TextEncoder.load("none")
    assert nothing.is_unconditional and nothing.encode(["a red ring", ""])[0].shape == (2, 1, 1)
    (tmp_path / "classes.txt").write_text("ring\nring\n")
    for name in ("classes.txt", "nowhere.txt"):
        with pytest.raises(LdmError, match=rf"{name} (has the class 'ring' twice|cannot be read)"):
            TextEncoder.load(str(tmp_path / name))
