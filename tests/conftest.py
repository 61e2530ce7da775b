("Shared by all tests: quiet progress, one thread per worker process, "
 "a small data set and a small trained run.")
import os
from pathlib import Path

os.environ.setdefault('FADA_QUIET', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    "60 phantoms of two categories, with their question table"
    from fada.data import prepare
    folder = tmp_path_factory.mktemp('data')/'phantoms'
    prepare(folder, 60, ['Femur', 'Abdomen'], seed=5, workers=2)
    return folder
