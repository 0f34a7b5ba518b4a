from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that the user's is neither read nor written."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEWBITS_CACHE", str(folder))
    return folder
