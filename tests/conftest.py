"Shared by all tests: quiet progress, one thread per worker process, a small data set and a small trained run."

import os
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ:  # two workers on two cores: one thread each, and one for what they start
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'FADA_THREADS'):
        os.environ.setdefault(name, '1')

os.environ.setdefault('FADA_QUIET', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import signal
import pytest

# a test run in the background of a shell ignores Ctrl-C, and so would the programs that these tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    "60 phantoms of two categories, with their question table"
    from fada.data import prepare

    folder = tmp_path_factory.mktemp('data') / 'phantoms'
    prepare(folder, 60, ['Femur', 'Abdomen'], seed=5, workers=2)
    return folder
