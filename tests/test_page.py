"""The page: one file, whole, quiet, and with the trace's own numbers in it."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import npformer
from npformer import checkpoint, cli, plot, tasks, training
from npformer.page import MOST_COLUMNS, MOST_ROWS, policy, write_page
from npformer.testing.models import make_model
from npformer.tracing import Entry, Trace, Watcher

CONFIG = npformer.TransformerConfig(
    9, 9, d_model=8, n_heads=2, d_ff=12, n_encoder_layers=1, n_decoder_layers=2, max_len=80
)
SRC, TGT = [3, 4, 5], [1, 6, 7, 8]


def written(path, src=SRC, tgt=TGT, source=None, target=None, config=CONFIG, **options):
    model = make_model(config, 0)
    targets = np.array([[*tgt[1:], 2]])
    sources = np.array([src]) if src else None
    seen = npformer.trace(model, sources, np.array([tgt]), target=targets)
    source = source or [f"s{i}" for i in src]
    target = target or [f"t{i}" for i in tgt]
    options |= {"source": source, "target": target, "about": "a <b>"}
    size = write_page(seen, path, src=src, tgt=tgt, **options)
    return seen, size


def data_of(path):
    text = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
    )[1]
    return json.loads(text)


def test_the_values_in_the_page_are_the_traces(tmp_path):
    seen, size = written(tmp_path / "page.html")
    assert size == (tmp_path / "page.html").stat().st_size < 3e6
    data = data_of(tmp_path / "page.html")
    assert [e["name"] for e in data["entries"]] == [e.name for e in seen]
    for entry, shown in zip(seen, data["entries"], strict=True):
        values = np.frombuffer(base64.b64decode(data["blocks"][shown["block"]]), np.float32)
        expected = np.atleast_1d(entry.value).astype(np.float32)
        if expected.size == values.size:
            np.testing.assert_array_equal(values, expected.reshape(-1), entry.name)
        else:
            assert "are left out" in shown["cut"]
    weights = next(e for e in data["entries"] if e["name"].endswith("cross_attn.weights"))
    assert weights["axes"] == ["target", "source"]
    assert weights["mask"] == "cross"
    assert "softmax" in weights["formula"]
    assert "exp(x)" in weights["equation"]
    assert re.search(r"^t6 +\. +\. +\.$", data["masks"]["cross"], re.MULTILINE)


# --- What the axes are called ------------------------------------------------------------------

NO_TWO_EQUAL = dict(d_model=10, n_heads=2, d_ff=13, n_encoder_layers=1, n_decoder_layers=2)
PARTS = [
    {},
    {"norm_first": True, "final_norm": True, "positions": "learned", "activation": "gelu"},
    {"share_embeddings": True, "tie_head": True},
    {"n_encoder_layers": 0, "activation": "gelu_tanh"},
    {"n_encoder_layers": 0, "positions": "learned", "norm_first": True},
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "post-norm")
def test_every_axis_of_every_tensor_is_called_what_it_counts(tmp_path, parts):
    """By its size, in a model and a sample in which no two sizes are equal."""
    n_source = 17 if "share_embeddings" in parts else 11
    config = npformer.TransformerConfig(n_source, 17, **(NO_TWO_EQUAL | parts))
    src = [] if config.n_encoder_layers == 0 else [3] * 4
    seen, _ = written(tmp_path / "page.html", src, [1] + [5] * 6, config=config)
    counts = {4: "source", 7: "target", 17: "target vocabulary", 11: "source vocabulary"}
    shown = data_of(tmp_path / "page.html")["entries"]
    assert len(shown) > 200
    for entry, about in zip(seen, shown, strict=True):
        expected = [None, None, *(counts.get(n) for n in entry.shape)][-2:]
        if entry.name.endswith(("order", "sorted_ids")):  # by id, not by position
            expected = [None, None]
        assert about["axes"] == expected, (entry.name, entry.shape)


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "post-norm")
def test_axes_have_their_names_where_every_size_is_the_same(tmp_path, parts):
    """Nothing can be read off the shapes: a source as long as its answer, the width, the words."""
    config = npformer.TransformerConfig(8, 8, **(NO_TWO_EQUAL | {"d_model": 8, "d_ff": 8} | parts))
    sizes = NO_TWO_EQUAL | {"d_model": 12, "d_ff": 14}
    other = npformer.TransformerConfig(8, 8, **(sizes | parts))
    named = []
    for c, n, m in ((config, 8, 8), (other, 3, 4)):
        src = [] if c.n_encoder_layers == 0 else [3] * n
        written(tmp_path / "page.html", src, [1] + [5] * (m - 1), config=c)
        shown = data_of(tmp_path / "page.html")["entries"]
        named.append({about["name"]: about["axes"] for about in shown})
    assert named[0] == named[1]


MEANT = """
encoder.layers.0.self_attn.scores                     source  source
encoder.layers.0.self_attn.kh                         source  -
encoder.layers.0.norm1.mean_dxhat                          -       source
decoder.layers.0.self_attn.dscores                    target  target
decoder.layers.0.self_attn.k_proj.x_rows              target  -
decoder.layers.0.cross_attn.weights                   target  source
decoder.layers.0.cross_attn.softmax.e                 target  source
decoder.layers.0.cross_attn.q_proj.linear.y           target  -
decoder.layers.0.cross_attn.k_proj.linear.y           source  -
decoder.layers.0.cross_attn.v_proj.dy_rows            source  -
decoder.layers.0.cross_attn.qh                        target  -
decoder.layers.0.cross_attn.k                         source  -
decoder.layers.0.cross_attn.vh                        source  -
decoder.layers.0.cross_attn.yh                        target  -
decoder.layers.0.cross_attn.dq                        target  -
decoder.layers.0.cross_attn.dk                        source  -
decoder.layers.0.cross_attn.attention.dv              source  -
decoder.layers.0.cross_attn.attention_weights.dk      source  -
decoder.layers.0.dv_memory                            source  -
decoder.layers.0.feed_forward.h                       target  -
decoder.dmemory                                       source  -
memory                                                source  -
e                                                     source  -
e#2                                                   target  -
mask                                                  -       source
mask#2                                                target  target
logits                                                target  target-vocabulary
loss.p                                                target  target-vocabulary
loss.losses                                           -       target
loss.dlogits                                          target  target-vocabulary
head.dweight                                          target-vocabulary  -
src_embedding.dweight                                 source-vocabulary  -
tgt_embedding.dweight                                 target-vocabulary  -
"""


def test_axes_mean_what_they_are_called(tmp_path):
    written(tmp_path / "page.html")
    axes = {about["name"]: about["axes"] for about in data_of(tmp_path / "page.html")["entries"]}
    for line in MEANT.strip().splitlines():
        name, *expected = line.split()
        expected = [None if kind == "-" else kind.replace("-", " ") for kind in expected]
        assert axes[name] == expected, name


def texts_of(path):
    return re.findall(r"<text [^>]*>([^<]*)</text>", path.read_text())


def test_a_step_is_called_what_it_has_read_and_what_it_says_on_every_picture(tmp_path):
    """`read → said`: on the page, in `pronounce --plot` and in `attention`."""
    matplotlib = pytest.importorskip("matplotlib")
    steps = ["start → t6", "t6 → t7", "t7 → t8", "t8 → end"]
    read, said = (list(tokens) for tokens in zip(*(s.split(" → ") for s in steps), strict=True))
    seen, _ = written(tmp_path / "page.html", target=read)
    assert data_of(tmp_path / "page.html")["said"] == said
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        plot.draw_alignment((["a", "b"], said, np.ones((4, 2))), tmp_path / "plot.svg")
        plot.draw_attention(seen, ["a", "b", "c"], read, said, tmp_path / "heads.svg")
    assert [text for text in texts_of(tmp_path / "plot.svg") if " → " in text] == steps + [
        "steps, read → said: who attends"
    ]
    decoder = [text for text in texts_of(tmp_path / "heads.svg") if " → " in text]
    assert decoder == steps * 8  # two layers, two attentions, two heads


class Nudger(Watcher):
    """Adds to one tensor as soon as it is made."""

    def noted(self, name, value):
        if name == self.nudged:
            value += self.by


@pytest.mark.parametrize("parts", PARTS[1::3], ids=lambda parts: "+".join(parts) or "post-norm")
def test_what_is_called_its_gradient_is(tmp_path, parts):
    """By a difference quotient: the loss where a tensor is moved, on its way, up and down."""
    src = [] if "n_encoder_layers" in parts else SRC
    sizes = NO_TWO_EQUAL | {"n_encoder_layers": 2, "d_model": 8}
    config = npformer.TransformerConfig(9, 9, **(sizes | parts))
    seen, _ = written(tmp_path / "page.html", src, config=config)
    gradients = data_of(tmp_path / "page.html")["gradients"]
    assert {"decoder.x", "decoder.x#2", "decoder.layers.0.self_attn.weights"} <= {*gradients}
    assert len(set(gradients.values())) == len(gradients)
    model, rng = make_model(config, 0), np.random.default_rng(0)
    for name, gradient in gradients.items():
        if "layers.0" in name:  # as in layers.1
            continue
        way = rng.standard_normal(seen[name].shape)
        losses = []
        for sign in (1e-5, -1e-5):
            nudger = Nudger(model)
            nudger.nudged, nudger.by = name, sign * way
            with nudger:
                logits, _ = model(np.array([src]) if src else None, np.array([TGT]))
            losses.append(npformer.cross_entropy(logits, np.array([[*TGT[1:], 2]]), 0)[0])
        moved = (losses[0] - losses[1]) / 2e-5
        assert moved == pytest.approx((seen[gradient].value * way).sum(), rel=1e-4, abs=1e-7), name


def test_a_trace_of_another_program_has_no_labels(tmp_path):
    entries = [Entry("scores", "forward", np.ones((4, 3)), "", "", "", 0)]
    options = {"source": ["a"] * 3, "target": ["b"] * 4}
    write_page(Trace(entries), tmp_path / "page.html", src=SRC, tgt=TGT, **options)
    assert data_of(tmp_path / "page.html")["entries"][0]["axes"] == [None, None]


def test_every_tensor_of_the_page_shows_its_line_and_its_equation(tmp_path):
    seen, _ = written(tmp_path / "page.html")
    for entry, about in zip(seen, data_of(tmp_path / "page.html")["entries"], strict=True):
        assert about["formula"] == entry.formula
        assert re.search(" (=|←) ", about["equation"]), entry.name


# --- In a browser ------------------------------------------------------------------------------


def test_it_asks_the_network_nothing(tmp_path):
    written(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=[\"']?https?:|@import|url\(|fetch\(|XMLHttp", page)


def test_markup_in_tokens_is_text(tmp_path):
    bad = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&amp;"]
    written(tmp_path / "page.html", source=bad)
    page = (tmp_path / "page.html").read_text()
    assert "alert(1)</script>" not in page.replace("\\u003c/script>", "")
    assert page.count("<script") == 2
    assert data_of(tmp_path / "page.html")["tokens"]["source"] == bad
    assert "innerHTML" not in page


def test_long_inputs_are_cut_and_it_says_so(tmp_path):
    long = [3 + i % 6 for i in range(70)]
    _, size = written(tmp_path / "page.html", src=long, tgt=[1, *long[:69]])
    assert size < 6e6
    entry = next(
        e for e in data_of(tmp_path / "page.html")["entries"] if e["name"].endswith("scores")
    )
    assert entry["shown"][-2:] == [MOST_ROWS, MOST_COLUMNS]
    assert re.search(r"[\d,]+ of [\d,]+ values are left out", entry["cut"])


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium to open the page")
def test_it_opens_without_an_error_and_shows_what_was_asked_for(tmp_path):
    page = tmp_path / "page.html"
    seen, _ = written(page)
    name = "decoder.layers.0.cross_attn.weights"
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
         "--enable-logging=stderr", "--dump-dom", f"{page.as_uri()}#{name}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert 'data-ready="true"' in done.stdout, done.stderr
    assert "CONSOLE" not in done.stderr
    assert f">{name}</h2>" in done.stdout
    assert "(1, 2, 4, 3)" in done.stdout
    assert done.stdout.count("<td") == 4 * 3
    headings = re.findall("<th(?: [^>]*)?>(.*?)</th>", done.stdout)
    read_said = ["t1", "→ t6", "t6", "→ t7", "t7", "→ t8", "t8", "→ end"]
    assert headings == ["", "", "s3", "s4", "s5", *read_said]
    assert f"{name.replace('weights', 'dweights')}" in done.stdout
    assert seen[name].formula in done.stdout
    assert "a &lt;b&gt;" in done.stdout


FORGED = """<style>body { display: none }</style><script>document.body.dataset.ready = "false";
document.body.dataset.hacked = "true";</script><img src="https://example.com/x.png"></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium to open the page")
def test_what_is_not_the_pages_own_neither_runs_nor_loads(tmp_path):
    page = tmp_path / "page.html"
    written(page)
    page.write_text(page.read_text().replace("</body>", FORGED))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert 'data-ready="true"' in done.stdout, done.stderr
    assert 'data-hacked="' not in done.stdout
    assert done.stderr.count("violates the following Content Security Policy") == 3, done.stderr


def test_the_policy_allows_the_pages_own_script_and_style_by_their_hashes(tmp_path):
    written(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.index("Content-Security-Policy") < page.index("<style>")
    allowed = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert allowed == policy(page)
    assert allowed.count("'sha256-") == 2
    assert "unsafe" not in allowed
    assert allowed.startswith("default-src 'none'; ")


CLICKS = """<script>
const said = {};
const later = (f) => new Promise((done) => setTimeout(() => { f(); done(); }, 50));
(async () => {
  const button = [...document.querySelectorAll("nav button")].find(
    (b) => data.entries[b.dataset.i].name === "NAME");
  button.click();
  await later(() => { said.name = document.getElementById("name").textContent; });
  document.getElementById("head").value = 1;
  document.getElementById("head").dispatchEvent(new Event("input"));
  document.getElementById("numbers").click();
  said.cell = document.querySelector('td[data-r="2"][data-c="1"]').textContent;
  document.querySelector('td[data-r="2"][data-c="1"]').dispatchEvent(
    new MouseEvent("mouseover", { bubbles: true }));
  said.hover = document.getElementById("said").textContent;
  document.querySelector("#links a").click();
  await later(() => { said.gradient = document.getElementById("name").textContent; });
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "n" }));
  await later(() => { said.next = document.getElementById("name").textContent; });
  location.hash = "decoder.layers.0.self_attn.weights";
  await later(() => document.querySelector('td[data-r="1"][data-c="3"]').dispatchEvent(
    new MouseEvent("mouseover", { bubbles: true })));
  said.why = document.getElementById("said").textContent;
  document.getElementById("layer").value = 1;
  document.getElementById("layer").dispatchEvent(new Event("input"));
  await later(() => { said.layer = document.getElementById("name").textContent; });
  const displayed = (selector) => [...document.querySelectorAll(selector)].filter(
    (x) => x.checkVisibility() && x.offsetParent && getComputedStyle(x).display !== "none");
  const find = (text) => {
    document.getElementById("find").value = text;
    document.getElementById("find").dispatchEvent(new Event("input"));
    return displayed("nav button").map((b) => data.entries[b.dataset.i].name);
  };
  said.found = find("Scores");
  said.places = displayed("nav details").length;
  said.nothing = [find("banana").length, displayed("nav details").length];
  said.nothing.push(displayed("#none").length);
  said.all = find("").length;
  said.none = displayed("#none").length;
  const boxes = () => ["#layerBox", "#headBox", "#stepBox", "#masks"].map(
    (box) => displayed(box).length);
  said.boxes = boxes();
  location.hash = "loss.losses";
  await later(() => { said.flat = boxes(); });
  location.hash = "logits";
  const heads = () => [...document.querySelectorAll("thead th")].map((x) => x.textContent);
  await later(() => { said.heads = heads(); });
  said.step = document.getElementById("stepOut").textContent;
  document.body.dataset.said = JSON.stringify(said);
})();
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium to open the page")
def test_clicks_keys_and_sliders_work(tmp_path):
    page, name = tmp_path / "page.html", "decoder.layers.0.cross_attn.weights"
    words = [f"w{i}" for i in range(9)]
    seen, _ = written(page, vocabularies=(words, words))
    text = page.read_text().replace("</body>", CLICKS.replace("NAME", name))
    allowed = re.search('content="(default-src[^"]*)"', page.read_text())[1]
    page.write_text(text.replace(allowed, policy(text)))  # one script more
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    said = json.loads(html.unescape(re.search(r'data-said="([^"]*)"', done.stdout)[1]))
    value = float(seen[name].value[0, 1, 2, 1])
    assert said["name"] == name
    assert float(said["cell"]) == pytest.approx(value, rel=5e-4)  # four digits
    assert said["hover"].startswith("[2, 1]  t7, s4:")
    assert said["gradient"] == name.replace("weights", "dweights")
    names = [entry.name for entry in seen]
    assert said["next"] == names[names.index(said["gradient"]) + 1]
    assert said["why"].endswith("may not attend: the key comes after the query")
    assert said["layer"] == "decoder.layers.1.self_attn.weights"
    assert said["hover"].endswith("step t7 → t8")
    found = [n for n in names if "scores" in n]
    assert sorted(said["found"]) == sorted(found)  # displayed, and nothing else is
    assert said["places"] == len({(n.rpartition(".")[0], seen[n].phase) for n in found})
    assert said["nothing"] == [0, 0, 1]
    assert (0 < said["all"] < len(names), said["none"]) == (True, 0)  # of the open place alone
    assert (said["boxes"], said["flat"]) == ([1, 1, 1, 1], [0, 0, 0, 0])
    assert said["heads"] == ["", "", *words]
    assert said["step"] == "t1 → t6"


def test_the_command(tmp_path, capsys):
    task, folder = tasks.load("sort"), tmp_path / "run"
    sizes = (len(task.src_vocabulary), len(task.tgt_vocabulary))
    config = npformer.TransformerConfig(*sizes, d_model=16, n_heads=2, d_ff=16, max_len=16)
    npformer.Transformer(config, np.random.default_rng(0)).save(folder)
    about = {"task": "sort", "backend": "numpy", "seed": 0, "recipe": {}}
    checkpoint.save_json(folder / training.RUN, about)
    out = tmp_path / "page.html"
    assert cli.main(["explain", str(folder), "312", "--out", str(out)]) == 0
    assert "sort: 312 -> " in capsys.readouterr().out
    assert data_of(out)["tokens"]["source"] == ["3", "1", "2"]
    (tmp_path / "file").write_text("")
    for command in (
        ["explain", str(folder), "3x", "--out", str(out)],
        ["explain", str(folder), "312", "--out", str(tmp_path / "file" / "page.html")],
        ["explain", str(tmp_path / "nowhere"), "312"],
    ):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
