"""Reports: the page, and how a browser shows it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from peft_dst.recipes import report
from tests.recipes import summaries
from tests.recipes.summaries import point, summary, write


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of two models, with every kind of picture, and names that are up to no good."""
    folder = tmp_path_factory.mktemp("report")
    hostile = "<script>document.title = 'no'</script>"
    one, two = summaries.everything(hostile, few=True), summaries.everything("Methods", seed=1, few=True)
    one["recipe"]["model"]["name"] = '"><img src=http://example.com/a.png>'
    one["points"][0]["title"] = one["overlap"][0]["titles"][0] = "\x1b[31m \ud800"
    one["versions"] = [{"torch": hostile}, {"torch": "2.13.0"}]
    one["failures"] = {hostile: "\x1b[31m" + hostile}
    two["overlap"] = []
    (folder / "one").mkdir()
    (folder / "one" / "summary.json").write_text(json.dumps(one))
    (folder / "two.json").write_text(json.dumps(two))
    files = report([folder / "one", folder / "two.json"], folder / "out")
    assert sorted(files) == sorted((folder / "out").iterdir())
    return files[0]


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)

    def all(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def test_the_page_needs_nothing_else(page):
    parsed = Parsed(page.read_text())
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    sources = parsed.all("src")
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    pictures = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert all(b"<svg" in picture and b"</svg>" in picture for picture in pictures)
    # No address but those that name kinds of XML.
    addresses = [address for picture in pictures for address in re.findall(rb'(?:href|src)="([^"]*)"', picture)]
    assert all(address.startswith((b"#", b"data:image/png;base64,")) for address in addresses)
    assert not re.search(r"url\(|@import", page.read_text())
    ids, targets = parsed.all("id"), parsed.all("href")
    assert len(set(ids)) == len(ids)
    assert targets
    assert all(target[0] == "#" and target[1:] in ids for target in targets)
    assert all(len(alt) > 20 for alt in parsed.all("alt"))
    # Each picture is there twice, and nothing else is.
    files = {file.name for file in page.parent.iterdir()} - {page.name}
    assert len(files) == len(sources)
    assert files == {f"{name}.png" for name in ids if f"{name}.png" in files}
    assert all((page.parent / name).read_bytes().startswith(b"\x89PNG") for name in files)
    assert all(name in "".join(parsed.text) for name in files)


def test_names_stay_text(page):
    parsed = Parsed(page.read_text())
    text = "".join(parsed.text)
    # Title, navigation, failure, its message, versions; and the alternative texts of pictures hold no more.
    assert text.count("<script>document.title = 'no'</script>") == 5
    assert '"><img src=http://example.com/a.png>' in text
    assert r"\x1b[31m \ud800" in text


def test_every_picture_is_there(page):
    ids = Parsed(page.read_text()).all("id")
    kinds = {"quality", "learning-rate", "churn", "overlap", "modules", "layers", "switching", "speed"}
    name = "1-script-document-title-no-script"
    assert {i.removeprefix(f"{name}-") for i in ids if i.startswith(f"{name}-")} == kinds
    assert {i.removeprefix("2-methods-") for i in ids if i.startswith("2-methods-")} == kinds - {"overlap"}
    assert "models-1-relative" in ids


def test_pictures_say_whose_subsets_they_show(tmp_path):
    """The mean over seeds; the first one's in summaries that were written when it was the only one looked at."""
    made = summaries.everything(few=True)
    file = write(tmp_path / "summary.json", made)

    def captions():
        text = "".join(Parsed(report([file], tmp_path / "out")[0].read_text()).text)
        shutil.rmtree(tmp_path / "out")
        found = [line for line in text.splitlines() if "finished subset" in line]
        return (
            len(found),
            ["in the mean over seeds" in line for line in found],
            ["first seed" in line for line in found],
        )

    assert captions() == (3, [True] * 3, [False] * 3)
    for subset in (*made["overlap"], *(entry["subset"] for entry in made["points"] if "subset" in entry)):
        del subset["seeds"]
    write(file, made)
    assert captions() == (3, [False] * 3, [True] * 3)


def test_the_same_results_make_the_same_pictures(tmp_path):
    made = summary([point([0.5, 0.6], 10 * i, method_epsilon=i / 100) for i in (1, 2)])
    file = write(tmp_path / "summary.json", made)
    page, *pictures = report([file, file], tmp_path / "out")
    sources = Parsed(page.read_text()).all("src")
    assert len(sources) == 4
    assert sources[:2] == sources[2:]
    # Sections of one name have pictures of their own.
    assert {picture.name for picture in pictures} == {
        f"{number}-a-sweep-{kind}.png" for number in (1, 2) for kind in ("quality", "speed")
    }


def test_a_sweep_that_failed_altogether(tmp_path):
    made = summary([point([], 0, method_name="full")], metric=None, split=None, failures={"run": "ValueError: why"})
    files = report([write(tmp_path / "summary.json", made)], tmp_path / "out")
    text = "".join(Parsed(files[0].read_text()).text)
    assert len(files) == 1
    assert "No run is finished." in text
    assert "run: ValueError: why" in text


def test_a_report_needs_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "peft_dst.recipes.report.p"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = write(tmp_path / "summary.json", summary([]))
    with pytest.raises(ValueError, match=r"a report needs matplotlib, .* pip install 'peft-dst\[plots\]'"):
        report([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Looks at the page from outside, in which nothing may run.
OUTSIDE = """<!DOCTYPE html><title>no</title><iframe src="report.html" width="WIDTH" height="900"></iframe><script>
onload = async () => {
  const page = frames[0].document
  await Promise.all([...page.images].map(image => image.decode()))
  document.title = JSON.stringify({
    title: page.title,
    images: [...page.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]),
    requests: frames[0].performance.getEntriesByType("resource").map(entry => entry.name),
    width: page.documentElement.scrollWidth,
    sections: [...page.querySelectorAll("section")].map(section => section.getBoundingClientRect().height),
  })
}
</script>"""


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page(page, tmp_path, width):
    """All pictures, nothing beyond the screen's edges; nothing asked of the network, nothing run, nothing complained of."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    shutil.copy(page, tmp_path / "report.html")
    (tmp_path / "outside.html").write_text(OUTSIDE.replace("WIDTH", str(width)))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000", "--virtual-time-budget=20000",
        f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom", (tmp_path / "outside.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    parsed = Parsed(done.stdout)
    seen = json.loads(next(text for text in parsed.text if text.startswith("{")))
    assert seen["title"] == "peft-dst report"
    assert len(seen["images"]) == len(list(page.parent.glob("*.png")))
    assert all(natural > 0 and 0 < shown <= width for natural, shown in seen["images"])
    assert seen["requests"] == []
    assert seen["width"] <= width
    assert all(height > 200 for height in seen["sections"])
