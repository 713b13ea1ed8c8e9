"""lm-evaluation-harness: our model against its Hugging Face backend, item by item."""

import json
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from gamayun_jax import cli
    from gamayun_jax.evaluate import lm_eval as lm_eval_adapter

import tokenizers
import zstandard
from test_hf import random_params, write_folder
from test_imported import byte_level

from gamayun_jax.config import DEMO_CORPUS, ModelConfig, UserError
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.evaluate.tasks import encode_pair
from gamayun_jax.interop.export_tokenizer import write_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # the harness has its own
torch.set_num_threads(1)
LANGUAGES = ("en", "ru", "tr")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_end|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
TASK = """
task: {name}_{language}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}_{language}.jsonl
    dev: {folder}/shots_{name}_{language}.jsonl
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: {kind}
"""
KINDS = {
    "choice": "multiple_choice",
    "word": "loglikelihood",
    "text": "loglikelihood_rolling",
    "write": "generate_until",
}
REST = {
    "choice": """
doc_to_text: "{{context}}\\n"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
num_fewshot: 2
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}
""",
    "word": """
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "text": """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "write": """
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
target_delimiter: ""
num_fewshot: 1
generation_kwargs: {until: ["\\n", "e", "а"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def embedded(path, language):
    lines = zstandard.decompress(path.read_bytes()).decode().splitlines()
    return [
        d for d in map(json.loads, lines) if d.get("language", language) == language
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks of all request types in three languages."""
    folder = tmp_path_factory.mktemp("tasks")
    demo = DEMO_CORPUS.parent / "demo_tasks"
    for language in LANGUAGES:
        choice = embedded(demo / "next_paragraph.jsonl.zst", language)[:10]
        word = embedded(demo / "last_word.jsonl.zst", language)[:10]
        text = embedded(DEMO_CORPUS / f"heldout/udhr.{language}.jsonl.zst", language)
        items = {"choice": choice, "word": word, "text": text[:8], "write": word}
        for name, found in items.items():
            for part, rows in (("shots_", found[:2]), ("", found[2:])):
                path = folder / f"{part}{name}_{language}.jsonl"
                lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
                path.write_text("".join(lines), "utf-8")
            head = TASK.format(
                name=name, language=language, folder=folder, kind=KINDS[name]
            )
            (folder / f"{name}_{language}.yaml").write_text(head + REST[name])
    return folder


@pytest.fixture(scope="module", params=["gamayun", "llama", "qwen2"])
def model(request, config, corpus, tmp_path_factory):
    """An exported model of ours, and imported kinds with a BOS and without one."""
    folder = tmp_path_factory.mktemp("hf") / request.param
    folder.mkdir()
    if request.param == "gamayun":
        cfg = ModelConfig(
            vocab_size=512, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2,
            head_dim=8, d_ff=64, max_seq_len=512, qk_norm=True,
        )  # fmt: skip
        write_folder(cfg, random_params(cfg), folder)
        tokenizer = Tokenizer(f"{config.data.corpus}/tokenizer.model")
        write_tokenizer(tokenizer, folder, cfg.max_seq_len)
        return folder
    bos = request.param == "llama"
    texts = [t for k in ("en", "ru") for _, t in corpus.heldout("udhr", k)]
    byte_level(folder, texts, bos)
    path = folder / "tokenizer_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "chat_template": TEMPLATE}))
    kind = transformers.LlamaConfig if bos else transformers.Qwen2Config
    cfg = kind(
        vocab_size=416, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1 if bos else 0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(cfg).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_bos_is_what_the_tokenizer_writes(named, writes, corpus, tmp_path):
    """`eval` and `lm-eval` on one folder give the same, which is torch's on the ids of
    AutoTokenizer; with hf_parity a whole text has BOS after BOS, as in the harness."""
    texts = [t for _, t in corpus.heldout("udhr", "en")]
    byte_level(tmp_path, texts, named)
    if writes:
        path = tmp_path / "tokenizer.json"
        tok = tokenizers.Tokenizer.from_file(str(path))
        tok.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
        tok.save(str(path))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=416, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def torch_score(before, after):
        with torch.inference_mode():
            out = model(torch.tensor([[*before, *after]])).logits[0, :-1].double()
        logp = torch.log_softmax(out[len(before) - 1 :], -1)
        return float(logp[range(len(after)), after].sum())

    lm = lm_eval_adapter.GamayunLM(str(tmp_path))
    own = HFTokenizer(tmp_path)
    asked = Instance("loglikelihood", {}, ("All human", " beings"), 0)
    before = auto("All human")["input_ids"]
    pair = before, auto("All human beings")["input_ids"][len(before) :]
    assert (before[0] == 1) == writes
    assert encode_pair(own, "All human", " beings") == pair
    expected = torch_score(*pair)
    assert lm.loglikelihood([asked], disable_tqdm=True)[0][0] == pytest.approx(
        expected, abs=1e-4
    )
    text = texts[0][:90]
    ids = auto(text, add_special_tokens=False)["input_ids"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    (found,) = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(torch_score([1], ids), abs=1e-3)
    (score,) = lm.scorer.rolling([own.encode(text)], own.start_id)  # as `eval` does
    assert found == pytest.approx(score, abs=1e-3)
    lm._parity = True
    (found,) = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    prefix = 1 if named else 0
    expected = torch_score([prefix], auto(text)["input_ids"])
    assert found == pytest.approx(expected, abs=1e-3)


def run(lm, tasks, **kwargs):
    names = [f"{kind}_{k}" for kind in KINDS for k in LANGUAGES]
    found = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **kwargs,
    )
    return found["results"], found["samples"]


@pytest.fixture(scope="module")
def backends(model):
    with torch.no_grad():
        theirs = HFLM(
            str(model), dtype="float32", device="cpu", batch_size=8, max_length=512
        )
        ours = lm_eval_adapter.GamayunLM(str(model), batch_size=8, hf_parity=True)
        yield ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_same_as_the_hugging_face_backend(backends, tasks, chat):
    _, theirs = backends
    if chat != bool(theirs.tokenizer.chat_template) and not theirs.tokenizer.bos_token:
        pytest.skip("the others do it")
    if chat and theirs.tokenizer.chat_template is None:
        pytest.skip("its tokenizer has no chat template")
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    (a, items_a), (b, items_b) = (run(lm, tasks, **options) for lm in backends)
    assert a.keys() == b.keys()
    scored, values = 0, set()
    for name, rows in items_b.items():
        for x, y in zip(items_a[name], rows, strict=True):
            assert x["arguments"] == y["arguments"]
            if name.startswith("write"):
                assert x["resps"] == y["resps"]
                values.add(x["resps"][0][0])
                continue
            for (p,), (q,) in zip(x["resps"], y["resps"], strict=True):
                p, q = (v if isinstance(v, tuple) else (v, None) for v in (p, q))
                assert abs(p[0] - q[0]) <= 1e-4 * max(1, abs(q[0]) / 100), name
                assert p[1] == q[1]
                scored += 1
        for metric, value in b[name].items():
            if isinstance(value, float):
                tolerance = 0 if "acc" in metric or "match" in metric else 1e-5
                assert a[name][metric] == pytest.approx(value, rel=tolerance), metric
    assert scored > 3 * (8 * 8 + 8 + 6) - 1  # acc_mutual_info asks for 4 more
    assert len(values) > 6  # the continuations are not all the same


@pytest.mark.slow
def test_windows_chats_and_repeats(backends):
    """Long contexts lose their beginning, as there; requests may be the same twice."""
    ours, theirs = backends
    long = "Все люди рождаются свободными и равными. " * 40
    pairs = [
        (long, "в своём достоинстве"), ("", "All human beings"), ("Her ", "kes"),
        (long, "и правах"), ("", "All human beings"), ("Bütün insanlar ", " hür"),
    ]  # fmt: skip
    asked = [Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)]
    a, b = (lm.loglikelihood(asked, disable_tqdm=True) for lm in backends)
    np.testing.assert_allclose([x for x, _ in a], [x for x, _ in b], atol=1e-4)
    assert [x for _, x in a] == [x for _, x in b]
    texts = [Instance("loglikelihood_rolling", {}, (long[:n],), 0) for n in (9, 1600)]
    a, b = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in backends)
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-4)
    if theirs.tokenizer.chat_template:
        chat = [{"role": "user", "content": "Merhaba"}]
        texts = [lm.apply_chat_template(chat) for lm in backends]
        assert texts[0] == texts[1]
        assert ours.tok_encode(texts[0]) == theirs.tok_encode(texts[0])
    with pytest.raises(UserError, match="nothing to score"):
        ours.loglikelihood([Instance("loglikelihood", {}, ("a", ""), 0)])


@pytest.mark.slow
def test_command(model, tasks, tmp_path):
    if model.name != "gamayun":
        pytest.skip("once is enough")
    argv = [
        "lm-eval", "--model", "gamayun", "--model_args", f"path={model}",
        "--tasks", "choice_tr", "--include_path", str(tasks),
        "--output_path", str(tmp_path),
    ]  # fmt: skip
    assert cli.main(argv) == 0
    (path,) = tmp_path.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert found["results"]["choice_tr"]["acc,none"] >= 0
    assert found["config"]["model"] == "gamayun"
