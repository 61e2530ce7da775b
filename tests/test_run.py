"""The run notebooks through papermill at a tiny setting, in the order a user runs them, steered by settings.ini
alone."""

import json, os, subprocess
from pathlib import Path
import pandas as pd
import pytest
from commands import typed
from fada.batch import Job, check_parameters, run_job, run_notebooks
from fada.settings import FadaError

NB = run_notebooks(Path(__file__).parent)
TINY = dict(vision_steps=4, answer_steps=4)


@pytest.fixture(scope='module')
def project(tmp_path_factory, small_data):
    "A project folder of its own: two lines of settings.ini name another data folder and another model"
    p = tmp_path_factory.mktemp('project')
    (p / 'settings.ini').write_text(f'[data]\nfolder = {small_data}\n[model]\nname = ours\n')
    (p / 'models.toml').write_text('[ours]\nlike = "blip2-nano"\ncheckpoint = "outputs/run/base/model"\n')
    return p


@pytest.fixture(scope='module')
def evaluated(project):
    "Prepared, a base trained from scratch, and evaluated"
    _run(project, 'prepare', 'prepare', categories='Femur,Abdomen', phantoms=60, seed=5)
    _run(project, 'train', 'base', task='base', categories='all', **TINY)
    _run(project, 'evaluate', 'evaluate-base', control_images=4)
    return project / 'outputs' / 'run'


def _run(project, notebook, name, **parameters):
    here = os.getcwd()
    os.chdir(project)  # a run notebook reads the settings of the folder it is started in
    try:
        r = run_job(Job(name, NB / f'{notebook}.ipynb', parameters, project / 'jobs' / name), threads=2)
    finally:
        os.chdir(here)
    assert r.state == 'done', r.reason
    return r


def test_two_lines_of_settings_reach_every_step(project, evaluated):
    run = evaluated
    assert (run / 'base' / 'model' / 'model.safetensors').exists()
    _run(project, 'train', 'lora', categories='Femur', steps=2, batch=4)
    about = json.loads((run / 'lora-Femur' / 'adapter' / 'fada.json').read_text())
    assert (
        about['model'] == 'ours'
        and about['categories'] == ['Femur']
        and (run / 'lora-Femur' / 'loss.png').stat().st_size > 1000
    )
    _run(project, 'train', 'planes', task='planes', categories='Femur,Abdomen')
    assert (run / 'planes-Femur-Abdomen' / 'loss.png').stat().st_size > 1000
    _run(
        project,
        'evaluate',
        'evaluate-lora',
        categories='Femur',
        adapter=str(run / 'lora-Femur' / 'adapter'),
        output=str(run / 'evaluate-lora'),
        control_images=4,
    )
    m = json.loads((run / 'evaluate-ours-fp32-all' / 'metrics.json').read_text())
    assert (
        m['identity']['model'] == 'ours' and m['categories'] == ['Abdomen', 'Femur'] and m['coverage']['failed'] == 0
    )
    assert set(m['questions']['1']['controls']) == {
        'majority',
        'majority in category',
        'blank',
        'shuffled same',
        'shuffled other',
        'no image',
    }
    _run(project, 'compare', 'compare')
    html = (run / 'report.html').read_text()
    assert (
        'ours fp32 + LoRA per category' in html
        and 'not a medical device' in html.lower()
        and 'http' not in html
        and 'The plane, beside a plain classifier' in html
    )


def test_arguments_win_over_settings(project):
    "The command line's own option comes before the file"
    r = subprocess.run(
        typed(
            'evaluate --model blip2-nano --categories Femur --images 2 --no-controls --out {out} --json --quiet',
            out=project / 'x',
        ),
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)['identity']['model'] == 'blip2-nano'


def test_every_answer_is_in_the_log(evaluated):
    "Each scored row has one record, and each record carries identity, question and image"
    run = evaluated / 'evaluate-ours-fp32-all'
    records = [json.loads(l) for l in (run / 'answers.jsonl').read_text().splitlines()]
    scores = pd.read_parquet(run / 'scores.parquet')
    asked = scores[~scores.condition.str.startswith('majority')]
    assert len(records) == len(asked) == len({r['key'] for r in records})
    assert all(
        r['identity']['base'] and r['question'] and (r['shown_sha256'] or r['condition'] == 'no image')
        for r in records
    )


def test_wrong_parameters_are_refused():
    with pytest.raises(FadaError, match='unknown parameter'):
        check_parameters(NB / 'train.ipynb', dict(category='Femur'))
    with pytest.raises(FadaError, match='is str'):
        check_parameters(NB / 'train.ipynb', dict(steps='ten'))


def test_a_failing_notebook_says_why(project, tmp_path):
    here = os.getcwd()
    os.chdir(project)
    try:
        r = run_job(Job('bad', NB / 'evaluate.ipynb', dict(categories='Femrr'), tmp_path / 'bad'))
    finally:
        os.chdir(here)
    assert r.state == 'failed' and 'did you mean Femur' in r.reason
