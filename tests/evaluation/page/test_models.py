"""The models of the page: names, settings, and one in memory at a time."""

import gc
import threading
import weakref

import pytest
from serve_kit import wait_until

from EasyLM.errors import UserError
from evaluation.page.models import ModelInfo, Models, split_settings
from evaluation.prompting import PrompterSettings


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Fake engines are in no cycle of references. A collection takes half a second after many imports."""
    monkeypatch.setattr(gc, "collect", lambda: None)


class FakeEngine:
    """An engine whose `close` ends its work, unless it `hangs`."""

    def __init__(self, name: str):
        self.name, self.is_closed, self.hangs = name, False, False

    def close(self, timeout: float) -> bool:
        self.is_closed = not self.hangs
        return self.is_closed


class Loader:
    """Loads fake engines, and checks that the one before is closed and forgotten."""

    def __init__(self):
        self.loaded: list[str] = []
        self._last = lambda: None

    def __call__(self, name: str) -> FakeEngine:
        assert self._last() is None, "another model is still in memory"
        if name == "broken":
            raise UserError("broken: no such file")
        engine = FakeEngine(name)
        self.loaded.append(name)
        self._last = weakref.ref(engine)
        return engine


def make_models(*names: str) -> tuple[Models, Loader]:
    loader = Loader()
    return Models([ModelInfo(name, 8, 7, 64) for name in names], loader, loader(names[0])), loader


def test_one_model_is_in_memory_at_a_time():
    models, loader = make_models("a", "b")
    for name in ("a", "b", "b", "a"):
        with models.engine(name) as engine:
            assert engine.name == name and not engine.is_closed
        del engine
    assert loader.loaded == ["a", "b", "a"]


def test_a_model_is_replaced_after_its_answers():
    models, loader = make_models("a", "b")
    finish, drawing = threading.Event(), threading.Event()

    def draw_with_a():
        with models.engine("a") as engine:
            drawing.set()
            finish.wait(60)
            assert not engine.is_closed
            del engine

    def draw_with_b():
        with models.engine("b") as engine:
            assert engine.name == "b"

    threads = [threading.Thread(target=draw_with_a), threading.Thread(target=draw_with_b)]
    threads[0].start()
    assert drawing.wait(60)
    threads[1].start()
    threads[1].join(0.05)
    assert loader.loaded == ["a"]  # in every order of events: the first answer is not finished
    finish.set()
    wait_until(lambda: loader.loaded == ["a", "b"])
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_model_that_cannot_be_loaded_leaves_the_page_usable():
    models, loader = make_models("a", "broken")
    with pytest.raises(UserError, match="no such file"), models.engine("broken"):
        pass
    with models.engine("a") as engine:
        assert engine.name == "a"
    assert loader.loaded == ["a", "a"]
    with pytest.raises(UserError, match="no model 'c': choose one of a, broken"), models.engine("c"):
        pass
    models.close(1)
    assert engine.is_closed


def test_no_model_is_loaded_beside_one_that_does_not_stop():
    models, loader = make_models("a", "b")
    with models.engine("a") as engine:
        engine.hangs = True
    for name in ("b", "a"):  # the first model has been told to stop: it answers nobody
        with pytest.raises(UserError, match="another model is still stopping"), models.engine(name):
            pass
    assert loader.loaded == ["a"]
    engine.hangs = False
    del engine
    with models.engine("b") as engine:
        assert engine.name == "b"
    assert loader.loaded == ["a", "b"]


def test_no_model_is_loaded_while_an_answer_needs_another(monkeypatch):
    for name in ("_FINISH_SECONDS", "_CLOSE_SECONDS"):
        monkeypatch.setattr(f"evaluation.page.models.{name}", 0.0)
    models, loader = make_models("a", "b")
    with models.engine("a") as engine:
        with pytest.raises(UserError, match="another model is still stopping"), models.engine("b"):
            pass
        assert engine.is_closed and loader.loaded == ["a"]
        del engine
    with models.engine("b"):
        assert loader.loaded == ["a", "b"]


def test_settings_are_split_by_model():
    settings = PrompterSettings("runs/1/params, other/params,x", vqgan="v", load_llama_config="m,,n", dtype="bf16")
    by_name = split_settings(settings)
    assert list(by_name) == ["1/params", "other/params", "x"]
    assert [one.checkpoint for one in by_name.values()] == ["runs/1/params", "other/params", "x"]
    assert {(one.vqgan, one.dtype) for one in by_name.values()} == {("v", "bf16")}
    assert [one.load_llama_config for one in by_name.values()] == ["m", "", "n"]
    assert list(split_settings(PrompterSettings("a/b/model,a/c/other/"))) == ["model", "other"]
    assert list(split_settings(PrompterSettings("a::d/f,b::d/f"))) == ["a::d/f", "b::d/f"]


def test_an_existing_path_may_contain_commas(tmp_path):
    (tmp_path / "a,b").mkdir()
    (settings,) = split_settings(PrompterSettings(str(tmp_path / "a,b"))).values()
    assert settings.checkpoint == str(tmp_path / "a,b")


@pytest.mark.parametrize(
    "settings, message",
    [
        (PrompterSettings("a,a"), "--checkpoint=a,a: must be different"),
        (PrompterSettings(" , "), "--checkpoint"),
        (PrompterSettings("a,b,c", vqgan="x,y"), "--vqgan=x,y: 2 values for 3 checkpoints"),
    ],
)
def test_wrong_lists_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        split_settings(settings)


def test_the_text_of_a_model_says_what_is_not_stated():
    text = ModelInfo("a", 8, 7, 64, "It knows cats.").text
    assert "of up to 7 images of 8x8 pixels. **Limits:** It knows cats." in text
    text = ModelInfo("a", 8, 1, 64).text
    assert "states no limits" in text and "1 image of" in text
