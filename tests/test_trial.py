"""A model tried on this machine: also a service, which holds no weights, and an ensemble, which holds those of its
parts."""

import json, sys
from pathlib import Path
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from services import Door, of_model
from fada.checkpoints import ledger, weights_bytes
from fada.cli import app
from fada.settings import FadaError
from fada.vlm import load

KEY = 'sk-proj-aVerySecretKey0123456789'
ROWS = """[ours]
like = "openai"
service = {{url = "{url}/v1", key = "OUR_KEY"}}
[twice]
like = "ensemble"
parts = {{structures = "blip2-nano", others = "blip2-nano"}}
[both]
like = "ensemble"
parts = {{blip2-nano = 1, ours = 1}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a service of the group's own behind a door, and ensembles"
    door = Door(of_model(load('blip2-nano')))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'state'))
    monkeypatch.setenv('OUR_KEY', KEY)
    (tmp_path / 'settings.ini').write_text('[remote]\nallowed = yes\nkeep_text = yes\nrequests_per_minute = 60000\n')
    (tmp_path / 'models.toml').write_text(ROWS.format(url=door.url))
    yield door
    door.close()


def fada(*words):
    "What a command of `fada` says in JSON"
    r = CliRunner().invoke(app, [*words, '--json'])
    if r.exception:
        raise r.exception
    return json.loads(r.stdout)


def test_a_service_and_ensembles_are_tried(here):
    """Eight answers each; weights are those that this machine holds: none, one model's, one model's beside the
    service"""
    nano = weights_bytes(load('blip2-nano').core)
    for name, held, at in (('ours', 0, 'remote'), ('twice', nano, 'fp32'), ('both', nano, 'fp32, remote')):
        r = fada('models', 'test', name)
        assert r['answer'] is True and len(r['answers']) == 8 and r['weights_bytes'] == held, r
        assert ledger(name)['tests'][at]['answers'] == r['answers']
    assert here.answered and all(KEY in json.dumps(h) for h in here.headers)
    assert KEY not in json.dumps(ledger('ours'))


def test_the_next_step_of_a_service(here, monkeypatch):
    "What `fada models access` names: nothing, a key, the gate"
    assert fada('models', 'access', 'ours')['next'] == ''
    Path('settings.ini').write_text('')
    assert '[remote] allowed = yes' in fada('models', 'access', 'ours')['next']
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    assert 'OPENAI_API_KEY' in fada('models', 'access', 'openai')['next']
    with pytest.raises(FadaError, match='nothing may be sent'):
        fada('models', 'test', 'ours')
