"""The page to play with rho: its script says what the package says, and its sliders work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from rhovae import AR1Normal, ar1
from rhovae.study import linear
from rhovae.study.published import PublishedNormal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402
import browser  # noqa: E402

TEXT = (ROOT / "docs" / "play.md").read_text()
SCRIPT = book.spectra() + (ROOT / "docs" / "play.js").read_text()
SPECTRA = {
    name: torch.tensor(entry["eigenvalues"], dtype=torch.float64)
    for name, entry in json.loads((ROOT / "data" / "spectra.json").read_text()).items()
}
PRICES = (("fixedPrice", linear.spectral_gap), ("trainedPrice", linear.trained_gap))
close = {"rtol": 1e-6, "atol": 1e-12}


@pytest.fixture(scope="module")
def chromium():
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.Browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def script(request):
    """Evaluate an expression after docs/play.js, by Node where it is, or else in Chromium."""

    def by_node(expression):
        code = f"{SCRIPT}\nconsole.log(JSON.stringify({expression}))"
        run = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, check=True)
        return json.loads(run.stdout)

    def by_chromium(expression):
        return json.loads(tab.evaluate(f"JSON.stringify({expression})"))

    if shutil.which("node"):
        return by_node
    tab = request.getfixturevalue("chromium")
    tab.open("about:blank")
    tab.evaluate(SCRIPT.replace('typeof document !== "undefined"', "false"))
    return by_chromium


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def posterior(case):
    loc = torch.full((case["d"],), case["location"], dtype=torch.float64)
    return AR1Normal(loc, tensor([case["s"]]).sqrt(), rho=tensor([case["rho"]]))


def test_the_script_says_what_the_package_says_of_a_posterior(script):
    cases = [
        {"d": d, "s": s, "rho": rho, "location": location}
        for d in (2, 7, 32)
        for s, location in ((0.01, 1.5), (1.0, 0.0), (2.0, 0.3))
        for rho in (-0.99, -0.3, 0.0, 0.8, 0.99)
    ]
    noise = torch.randn(32, dtype=torch.float64)
    found = script(
        f"{json.dumps(cases)}.map((q) => ({{ kl: rhoPlay.kl(q, 16),"
        " covariance: rhoPlay.covariance(q.s, q.rho, q.d),"
        " cholesky: rhoPlay.cholesky(q.s, q.rho, q.d),"
        f" chain: rhoPlay.chain({noise.tolist()}.slice(0, q.d), q) }}))"
    )
    for case, got in zip(cases, found, strict=True):
        q, d = posterior(case), case["d"]
        torch.testing.assert_close(tensor(got["covariance"]), q.covariance_matrix, **close)
        torch.testing.assert_close(tensor(got["cholesky"]), q.scale_tril, **close)
        drawn = q.loc + q.scale * ar1.correlate(noise[:d], q.rho)
        torch.testing.assert_close(tensor(got["chain"]), drawn, **close)
        prior = Independent(Normal(torch.zeros(d).double(), 1.0), 1)
        torch.testing.assert_close(tensor(got["kl"]["total"]), kl_divergence(q, prior), **close)
        Sigma = q.covariance_matrix
        parts = {
            "place": q.loc.square().sum() / 2,
            "spread": (Sigma.trace() - d) / 2,
            "volume": -Sigma.diagonal().log().sum() / 2,
            "correlation": (Sigma.diagonal().log().sum() - torch.logdet(Sigma)) / 2,
        }
        for name, part in parts.items():
            torch.testing.assert_close(
                tensor(got["kl"][name]), part, rtol=1e-6, atol=1e-9, msg=name
            )
        log_s, z = tensor([case["s"]]).log(), tensor([case["rho"]]).atanh()
        charged = PublishedNormal(q.loc, log_s, z, True, epsilon=0.0).charged_kl(16)
        torch.testing.assert_close(tensor(got["kl"]["charged"]), charged, rtol=1e-6, atol=1e-9)


def test_the_script_finds_the_eigenvalues(script):
    cases = [[rho, d] for d in (1, 2, 9, 50) for rho in (0.0, 0.2, 0.9, 0.999)]
    found = script(f"{json.dumps(cases)}.map(([rho, d]) => rhoPlay.eigenvalues(rho, d))")
    for (rho, d), got in zip(cases, found, strict=True):
        expected = linear.ar1_shape(tensor(rho), d).flip(0)
        torch.testing.assert_close(tensor(got), expected, rtol=1e-6, atol=0)


def test_the_script_finds_the_prices(script):
    chosen = [
        ("rhoPlay.powerLaw({}, {})", exponent, d)
        for d in (2, 20, 50)
        for exponent in (0, 0.5, 1, 3)
    ]
    chosen += [
        ('rhoPlay.fromSpectrum(rhoSpectra["{}"], {})', name, d)
        for name in SPECTRA
        for d in (5, 10, 50)
    ]
    variances = [call.format(what, d) for call, what, d in chosen]
    found = script(
        f"[{', '.join(variances)}].map((v) => [rhoPlay.fixedPrice, rhoPlay.trainedPrice].map("
        "(price) => [price(v.map(() => 1), v), ...rhoPlay.bestRho(v, price)]))"
    )
    for (_, what, d), prices in zip(chosen, found, strict=True):
        if what in SPECTRA:
            v = linear.posterior_variances(SPECTRA[what], d)
        else:
            v = torch.arange(1, d + 1).double() ** what
        for (_, gap), (isotropic, rho, chain) in zip(PRICES, prices, strict=True):
            best, price = linear.best_rho(v, gap)
            expected = tensor([gap(torch.ones_like(v), v), price])
            torch.testing.assert_close(tensor([isotropic, chain]), expected, rtol=1e-6, atol=1e-9)
            # The price is flat around its least value, so rho has half of its digits.
            assert abs(rho - best) < 1e-6


def test_the_decoder_of_theorem_2_exists_for_each_power_law():
    for exponent in torch.tensor([0.05, 0.2, 0.5, 1.0, 2.0, 3.0]).double():
        spectrum = torch.arange(1, 785).double() ** -exponent
        for d in (2, 3, 10, 20, 50):
            v = linear.posterior_variances(spectrum, d)
            for rho in (0.0, linear.best_rho(v, linear.trained_gap)[0]):
                root = (spectrum[:d] / linear.ar1_shape(tensor(rho), d)).sqrt()
                y = root * (spectrum[:d] / root).mean()  # as in notebook 7
                assert y.min() > spectrum[d:].mean(), (exponent, d, rho)


def test_the_answers_are_right():
    answers = re.findall(r"<summary>Answer</summary>(.*?)</details>", TEXT, flags=re.DOTALL)
    prior = Independent(Normal(torch.zeros(10).double(), 1.0), 1)
    shared = {"d": 10, "s": 1.0, "location": 0.0}
    strong = kl_divergence(posterior(shared | {"rho": 0.9}), prior)
    assert f"{strong:.3f} nats" in answers[0] and f"{strong / 9:.3f} nats for each" in answers[0]
    assert torch.isclose(kl_divergence(posterior(shared | {"rho": -0.9}), prior), strong)
    assert f"{strong:.3f} nats" in answers[1]
    narrow = posterior({"d": 10, "s": 0.01, "rho": 0.0, "location": 1.0})
    cost = kl_divergence(narrow, prior)
    released = PublishedNormal(narrow.loc, tensor([0.01]).log(), tensor([0.0]), True, epsilon=0.0)
    charged = released.charged_kl(128)
    assert f"costs {cost:.3f} nats" in answers[2] and f"{charged:.3f} nats" in answers[2]

    def fixed(v):
        return linear.spectral_gap(torch.ones_like(v), v).item(), *linear.best_rho(v)

    for exponent in (0.5, 1, 3):
        assert fixed(tensor([1.0, 2.0]) ** exponent)[2] < 1e-12
    assert abs(fixed(tensor([1.0, 2.0]))[1] - 1 / 3) < 1e-6 and r"\rho=\frac13" in answers[3]
    three, twenty = (fixed(torch.arange(1, d + 1).double())[2] for d in (3, 20))
    assert f"costs {three:.3f} nats" in answers[3] and f"{twenty:.3f}" in answers[3]
    for name, spectrum in SPECTRA.items():
        for d in (10, 50):
            isotropic, _, chain = fixed(linear.posterior_variances(spectrum, d))
            assert f"from {isotropic:.3f} to {chain:.3f}" in answers[4], (name, d)
            assert f"{1 - chain / isotropic:.0%}".replace("%", " %") in answers[4]


@pytest.fixture
def page(chromium, tmp_path):
    """The figures of play.md and their scripts, without Sphinx and its theme."""
    figures = "\n".join(re.findall(r"```\{raw\} html\n(.*?)```", TEXT, flags=re.DOTALL))
    static = tmp_path / "_static"
    static.mkdir()
    shutil.copy(ROOT / "docs" / "play.js", static)
    (static / "spectra.js").write_text(book.spectra())
    (tmp_path / "play.html").write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Play</title>'
        f"<style>{(ROOT / 'docs' / 'book.css').read_text()}</style></head>"
        f"<body><article>{figures}</article></body></html>"
    )
    return tmp_path / "play.html"


def shown(tab, name):
    """A number of the page, after it had the time to draw."""
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    return float(tab.evaluate(f"document.getElementById('{name}').textContent").replace("−", "-"))


@pytest.mark.parametrize("width", browser.WIDTHS)
def test_the_page_is_in_order_by_itself(chromium, page, width):
    assert browser.faults(chromium, page, width) == []


def test_a_slider_moves_the_posterior(chromium, page):
    chromium.resize(1280)
    chromium.open(page.as_uri())
    q = {"d": 10, "s": 10**-0.3, "rho": 0.8, "location": 0.0}
    prior = Independent(Normal(torch.zeros(10).double(), 1.0), 1)
    assert shown(chromium, "play-total") == round(kl_divergence(posterior(q), prior).item(), 3)
    pictures = ["covariance", "cholesky", "draws", "ellipse"]
    before = [chromium.evaluate(f"document.getElementById('play-{p}').innerHTML") for p in pictures]
    chromium.evaluate("document.getElementById('play-rho').focus()")
    for _ in range(3):
        chromium.press("ArrowRight")
    assert shown(chromium, "play-rho-value") == 0.83
    moved = posterior(q | {"rho": 0.83})
    assert shown(chromium, "play-total") == round(kl_divergence(moved, prior).item(), 3)
    log_det = torch.logdet(moved.covariance_matrix).item()
    assert shown(chromium, "play-logdet") == round(log_det, 3)
    after = [chromium.evaluate(f"document.getElementById('play-{p}').innerHTML") for p in pictures]
    assert all(old != new for old, new in zip(before, after, strict=True))
    chromium.press("Tab")  # to the variance
    chromium.press("Home")
    assert shown(chromium, "play-s-value") == 0.01
    # A click on the middle of its track moves the first slider to zero.
    box = "document.getElementById('play-rho').getBoundingClientRect()"
    x, y = chromium.evaluate(f"[{box}.left + {box}.width / 2, {box}.top + {box}.height / 2]")
    for kind in ("mousePressed", "mouseReleased"):
        chromium.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert abs(shown(chromium, "play-rho-value")) < 0.03
    chromium.click("document.getElementById('play-noise')")
    shown(chromium, "play-total")
    draws = chromium.evaluate("document.getElementById('play-draws').innerHTML")
    assert draws not in (before[2], after[2])
    assert chromium.errors == []


def test_a_slider_moves_the_price(chromium, page):
    chromium.open(page.as_uri())
    chromium.evaluate("document.getElementById('price-exponent').focus()")
    chromium.press("ArrowRight")
    v = torch.arange(1, 21).double() ** 1.05
    for name, gap in (("fixed", linear.spectral_gap), ("trained", linear.trained_gap)):
        rho, price = linear.best_rho(v, gap)
        assert shown(chromium, f"price-chain-{name}") == round(price, 3)
        assert shown(chromium, f"price-rho-{name}") == round(rho, 3)
        isotropic = gap(torch.ones_like(v), v).item()
        assert shown(chromium, f"price-isotropic-{name}") == round(isotropic, 3)
    chromium.evaluate("document.getElementById('price-spectrum').focus()")
    for kind in ("keyDown", "keyUp"):
        chromium.send("Input.dispatchKeyEvent", type=kind, key="m", text="m"[: kind == "keyDown"])
    rho, price = linear.best_rho(linear.posterior_variances(SPECTRA["mnist"], 20))
    assert shown(chromium, "price-chain-fixed") == round(price, 3)
    assert chromium.evaluate("document.getElementById('price-exponent').disabled")
    assert chromium.errors == []


def test_every_control_is_named(chromium, page):
    chromium.open(page.as_uri())
    names = chromium.evaluate(
        "[...document.querySelectorAll('input, select')].map((e) => e.labels[0]?.textContent)"
    )
    assert len(names) == 7 and all(names)
    pictures = chromium.evaluate(
        "[...document.querySelectorAll('svg[viewBox]')].map((e) =>"
        " e.getAttribute('role') === 'img' && e.ariaLabel.length)"
    )
    assert len(pictures) == 6 and all(pictures)
