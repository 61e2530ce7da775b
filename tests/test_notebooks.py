"Every library notebook runs from top to bottom: its examples are its tests."

from pathlib import Path
import pytest
from nbdev import test as nbt
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / 'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('notebook', LIBRARY, ids=lambda p: p.stem)
def test_library_notebook(notebook):
    ok, _ = nbt.test_nb(notebook, skip_flags=get_config(ROOT).tst_flags, basepath=ROOT)
    assert ok
