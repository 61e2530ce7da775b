"Fine-tuning: cut off and gone on with to the same bytes, stopped by what cannot succeed, shared between processes."

import json, os, signal, subprocess, sys, time

from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from commands import typed
from fada.data import load_table
from fada.finetune import finetune
from fada.resume import CHECKPOINT, read_checkpoint
from fada.settings import FadaError
from fada.vlm import load

PINNED = dict(os.environ, OMP_NUM_THREADS='1', FADA_THREADS='1', MKL_NUM_THREADS='1')
QUICK = dict(steps=6, batch=4, checks=2, validation_images=2, images=8)


def nano():
    return load('blip2-nano', device='cpu', precision='fp32', max_new_tokens=8)


def command(data, out, *more):
    return [
        *typed(
            'train --data {data} --categories Femur --output {output} --steps 40 --batch 4 --checks 2 '
            '--keep-every 3 --json --quiet',
            data=data,
            output=out,
        ),
        *more,
    ]


@pytest.mark.fault
def test_killed_training_ends_with_the_same_bytes(tmp_path, small_data):
    """SIGKILL at three moments: at most one interval is lost, and the adapter is that of an unbroken run, byte for
    byte"""
    subprocess.run(command(small_data, tmp_path / 'whole'), check=True, env=PINNED, stdout=subprocess.DEVNULL)
    at = tmp_path / 'broken' / 'adapter' / CHECKPOINT
    stood = []
    for after in (2, 12, 25):
        p = subprocess.Popen(
            command(small_data, tmp_path / 'broken'), env=PINNED, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.time() + 120
        while p.poll() is None and time.time() < end:
            if at.exists() and read_checkpoint(at)[1]['step'] >= after:
                break
            time.sleep(0.002)
        p.send_signal(signal.SIGKILL)
        p.wait()
        stood.append(read_checkpoint(at)[1]['step'])
        assert not (at.parent / 'fada.json').exists()
    assert stood == sorted(stood) and stood[-1] < 40
    said = json.loads(
        subprocess.run(
            command(small_data, tmp_path / 'broken'), check=True, env=PINNED, capture_output=True, text=True
        ).stdout
    )
    a, b = (tmp_path / n / 'adapter' / 'adapter_model.safetensors' for n in ('whole', 'broken'))
    assert a.read_bytes() == b.read_bytes()
    whole = json.loads((tmp_path / 'whole' / 'adapter' / 'fada.json').read_text())
    assert said['losses'] == whole['losses'] and said['validation'] == whole['validation'] and not at.exists()
    assert {p.name for p in a.parent.iterdir()} == {p.name for p in b.parent.iterdir()}


@pytest.mark.fault
def test_full_disk_at_a_checkpoint(tmp_path, small_data, monkeypatch):
    "A file system that is full: one sentence, no torn file, the last good checkpoint stays and is gone on from"
    from fada import resume

    real = os.fsync
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, 'No space left on device')
        return real(fd)

    monkeypatch.setattr(resume.os, 'fsync', full)
    with pytest.raises(FadaError, match='No space left on device.*the last good one stays'):
        finetune(nano(), small_data, ['Femur'], tmp_path, keep_every=1, skip_preflight=True, **QUICK)
    assert read_checkpoint(tmp_path / CHECKPOINT)[1]['step'] == 2 and not list(tmp_path.glob('.*part'))
    monkeypatch.setattr(resume.os, 'fsync', real)
    about = finetune(nano(), small_data, ['Femur'], tmp_path, keep_every=1, skip_preflight=True, **QUICK)
    assert len(about['losses']) == 6 and about['preflight'] == 'skipped'


def test_folder_of_another_run(tmp_path, small_data):
    "Refused; done where it is this very run; replaced where that is asked for"
    go = lambda **kw: finetune(nano(), small_data, ['Femur'], tmp_path, skip_preflight=True, **{**QUICK, **kw})
    first = go()
    at = (tmp_path / 'adapter_model.safetensors').stat().st_mtime_ns
    assert (
        go() == json.loads((tmp_path / 'fada.json').read_text())
        and (tmp_path / 'adapter_model.safetensors').stat().st_mtime_ns == at
    )
    with pytest.raises(FadaError, match='holds another run.*--replace'):
        go(seed=1)
    assert go(seed=1, replace=True)['run'] != first['run']


def test_two_equal_runs_and_parts_of_a_step(tmp_path, small_data):
    """Same seed, same bytes; a step in four parts has the loss and gradients of the whole; rows apart those of
    packed ones"""
    go = lambda n, **kw: finetune(nano(), small_data, ['Femur'], tmp_path / n, skip_preflight=True, **{**QUICK, **kw})
    a, _, parts, apart, anew = go('a'), go('b'), go('c', accumulate=4), go('d', packing=False), go('e', cache=False)
    assert (tmp_path / 'a' / 'adapter_model.safetensors').read_bytes() == (
        tmp_path / 'b' / 'adapter_model.safetensors'
    ).read_bytes()
    assert a['packed'] and not apart['packed'] and a['features']['kept'] and not anew['features']['kept']
    for other in (parts, apart, anew):
        for key in ('losses', 'gradient_norms'):
            assert np.allclose([v for _, v in a[key]], [v for _, v in other[key]], atol=2e-4), key


@pytest.mark.fault
def test_an_image_that_vanishes(tmp_path, small_data, monkeypatch):
    "Left out with a record; none left is an error, and so is a damaged one"
    import shutil
    from fada import loop

    data = tmp_path / 'data'
    shutil.copytree(small_data, data)
    real = loop.Fit.take
    gone = []

    def take(self):
        if self.step == 2 and not gone:
            gone.append(self.material.names[0])
            (data / gone[0]).unlink()
        return real(self)

    monkeypatch.setattr(loop.Fit, 'take', take)
    about = finetune(
        nano(), data, ['Femur'], tmp_path / 'a', cache=False, skip_preflight=True, **{**QUICK, 'batch': 8}
    )
    assert about['lost_images'] == {gone[0]: 'vanished while training'} and len(about['losses']) == 6
    monkeypatch.setattr(
        loop.Fit, 'take', lambda self: ([(data / n).unlink(missing_ok=True) for n in self.material.names], real(self))
    )
    shutil.copytree(small_data, data, dirs_exist_ok=True)
    with pytest.raises(FadaError, match='none of the 4 images of a step is there any more'):
        finetune(nano(), data, ['Femur'], tmp_path / 'b', cache=False, skip_preflight=True, **QUICK)
    shutil.copytree(small_data, data, dirs_exist_ok=True)
    name = load_table(data, ['Femur'], 'train').image[0]
    (data / name).unlink()
    with pytest.raises(FadaError, match=Path(name).name):
        finetune(nano(), data, ['Femur'], tmp_path / 'c', skip_preflight=True, **{**QUICK, 'images': 0})


@pytest.mark.fault
def test_numbers_that_are_none(tmp_path, small_data, monkeypatch):
    "One bad step is left out and noted; five stop the training, say which part, and keep the checkpoint"
    from fada import loop

    real = loop.Material.loss

    def bad(when):
        return lambda self, at, only=None: real(self, at, only) * (float('nan') if only is None and next(when) else 1)

    monkeypatch.setattr(loop.Material, 'loss', bad(iter([0, 1, 0, 0, 0, 0])))
    about = finetune(nano(), small_data, ['Femur'], tmp_path / 'a', skip_preflight=True, **QUICK)
    assert (
        [s['step'] for s in about['skipped_steps']] == [2]
        and len(about['losses']) == 5
        and 'language_model' in about['skipped_steps'][0]['parts']
    )
    monkeypatch.setattr(loop.Material, 'loss', bad(iter([0] + [1] * 9)))
    with pytest.raises(FadaError, match='no number in 5 steps.*language_model.*lower learning rate'):
        finetune(nano(), small_data, ['Femur'], tmp_path / 'b', skip_preflight=True, keep_every=1, **QUICK)
    assert read_checkpoint(tmp_path / 'b' / CHECKPOINT)[1]['step'] == 5


def test_early_stop_keeps_the_best(tmp_path, small_data, monkeypatch):
    from fada import loop

    scores = iter([0.5, 0.6, 0.55, 0.6, 0.4, 0.9])
    real = loop.describe_check
    monkeypatch.setattr(loop, 'describe_check', lambda *a: dict(real(*a), score=next(scores)))
    about = finetune(
        nano(), small_data, ['Femur'], tmp_path, skip_preflight=True, **{**QUICK, 'checks': 6, 'patience': 3}
    )
    assert (
        about['stopped_early'] and about['kept_step'] == 1 and [s for s, _ in about['validation']] == [0, 1, 2, 3, 4]
    )


def test_the_tower_is_laid_aside(tmp_path, small_data, monkeypatch):
    """No weight of the tower is held while steps are taken, all of them are afterwards; answers are those of the
    adapter loaded anew"""
    from fada import loop

    real = loop.Fit.take
    held = []

    def take(self):
        held.append(sum(p.numel() for n, p in self.vlm.model.named_parameters() if 'vision_model' in n))
        return real(self)

    monkeypatch.setattr(loop.Fit, 'take', take)
    vlm = nano()
    about = finetune(vlm, small_data, ['Femur'], tmp_path / 'a', **QUICK)
    tower = sum(p.nbytes for p in vlm.core.vision_model.parameters())
    assert set(held) == {0} and about['features']['tower_bytes_freed'] >= tower > 0
    image = np.full((120, 150), 90, np.uint8)
    of = lambda v: [(a.text, a.confidence) for a in v.ask(image, [1, 6])]
    assert of(vlm) == of(load('blip2-nano', tmp_path / 'a', device='cpu', precision='fp32', max_new_tokens=8))
    held.clear()
    about = finetune(nano(), small_data, ['Femur'], tmp_path / 'b', cache=False, skip_preflight=True, **QUICK)
    assert set(held) == {tower // 4} and 'tower_bytes_freed' not in about['features']


def test_rare_answers_by_settings(tmp_path, small_data, monkeypatch):
    """Drawn more often, weighed more, or neither: as settings.ini says, told in the adapter and its card; packed or
    apart the same"""
    from fada.finetune import train_job
    from fada.settings import load_settings

    def few(t):  # four abnormal images
        rare = t[t.split == 'train'].image.unique()[:4]
        at = t.image.isin(rare) & (t.question_id == 7)
        return t.assign(
            answer=t.answer.mask(at, 'abnormal: short femur'), structured=t.structured.mask(at, '{"normal": false}')
        )

    data = edited(small_data, tmp_path / 'data', few)

    def go(n, ini, **kw):
        (tmp_path / 'settings.ini').write_text('[train]\n' + ini)
        monkeypatch.chdir(tmp_path)
        name = tmp_path / n
        s = load_settings(
            data=str(data), categories='Femur,Abdomen', model='blip2-nano', precision='fp32', device='cpu'
        )
        about = train_job(s, name, skip_preflight=True, **{**QUICK, 'images': 0, **kw})
        return about, about['classes']['normality']['abnormal'], (name / 'adapter' / 'README.md').read_text()

    draw, d, _ = go('draw', 'rare_weight = 5')
    none, o, _ = go('none', 'balance = none')
    loss, l, card = go('loss', 'balance = loss\nrare_weight = 4')
    assert (
        d['drawn'] > 2 * o['drawn']
        and d['weight'] == o['weight'] == 1
        and l['drawn'] == o['drawn']
        and 1 < l['weight'] <= 4
    )
    assert loss['recipe']['balance'] == 'loss' and f"| {l['weight']} |" in card and 'found in validation' in card
    apart, _, _ = go('apart', 'balance = loss\nrare_weight = 4', packing=False, accumulate=2)
    curve = lambda a: np.array([v for _, v in a['losses']])
    assert np.allclose(curve(loss), curve(apart), atol=2e-4) and not np.allclose(curve(loss), curve(none), atol=1e-3)
    with pytest.raises(FadaError, match='balance.*draw, loss, none'):
        go('x', 'balance = los')


def test_confidence_is_calibrated(tmp_path, small_data):
    "Fitted on validation answers, kept with the adapter, part of its identity, undone with it"
    from fada.choices import calibrated

    vlm = nano()
    bare = vlm.identity()
    about = finetune(
        vlm, small_data, ['Femur', 'Abdomen'], tmp_path, skip_preflight=True, **{**QUICK, 'validation_images': 12}
    )
    c = about['calibration']
    assert c['answers'] > 40 and c['error_after'] < c['error_before']
    again = load('blip2-nano', tmp_path, device='cpu', precision='fp32', max_new_tokens=8)
    assert again.identity() == vlm.identity() != bare
    image = np.full((120, 150), 90, np.uint8)
    after = [a.confidence for a in again.ask(image, [1, 6])]
    again.calibration = None
    before = [a.confidence for a in again.ask(image, [1, 6])]
    assert np.allclose(after, [calibrated(p, c['fit']) for p in before]) and not np.allclose(after, before)
    assert 'calibrated on' in (tmp_path / 'README.md').read_text()


def test_a_composed_model_learns_its_new_parts_first(tmp_path, small_data, monkeypatch):
    "Q-Former and projection alone for half as many steps, LoRA untouched meanwhile; then both"
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny import tiny
    from fada import loop
    from fada.registry import part_of

    name, _, weights = tiny('blip2-llama', tmp_path)
    real = loop.Fit.take
    moved = []

    def take(self):
        named = {n: p for n, p in self.vlm.model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in named.items()}
        real(self)
        moved.append(
            {'lora' if 'lora_' in n else part_of(n) for n, p in named.items() if not p.detach().equal(before[n])}
        )

    monkeypatch.setattr(loop.Fit, 'take', take)
    vlm = load(name, weights=weights, device='cpu', precision='fp32', max_new_tokens=4)
    about = finetune(vlm, small_data, ['Femur'], tmp_path / 'a', skip_preflight=True, **QUICK)
    assert (
        len(about['losses']) == 9
        and moved[:3] == [{'qformer', 'projection'}] * 3
        and moved[4] == {'qformer', 'projection', 'lora'}
    )


def edited(data, out, change):
    "A copy of a data folder with another question table"
    import shutil

    shutil.copytree(data, out)
    p = out / 'questions.parquet'
    change(pd.read_parquet(p)).to_parquet(p)
    return out


@pytest.mark.parametrize(
    'change,said',
    [
        (lambda t: t[t.split != 'train'], "no rows in split 'train'"),
        (lambda t: t[t.split != 'val'], "no rows in split 'val'"),
        (lambda t: t[t.question_id == 5], 'every question has one answer'),
    ],
)
def test_data_that_cannot_teach(tmp_path, small_data, change, said):
    "No training rows, no validation, one answer only"
    data = edited(small_data, tmp_path / 'data', change)
    with pytest.raises(FadaError, match=said):
        finetune(nano(), data, ['Femur'], tmp_path / 'a', **QUICK)


def test_preflight_of_a_broken_model(tmp_path, small_data, monkeypatch):
    """A frozen part that is trained, an image that is not there, a rate that teaches nothing: each is a finding
    that stops"""
    from fada import finetune as ft

    go = lambda n, **kw: finetune(nano(), small_data, ['Femur'], tmp_path / n, **{**QUICK, **kw})
    real = ft.add_lora

    def thaw(vlm, rank):
        out = real(vlm, rank)
        next(p for n, p in vlm.model.named_parameters() if 'vision' in n).requires_grad_()
        return out

    monkeypatch.setattr(ft, 'add_lora', thaw)
    with pytest.raises(FadaError, match='preflight, what is trained: a frozen part.*vision_model'):
        go('a')
    monkeypatch.setattr(ft, 'add_lora', real)
    import fada.preflight as pf

    monkeypatch.setattr(pf, '_queries', lambda m, i: 3)
    with pytest.raises(FadaError, match='preflight, image tokens: .* 3 image tokens where 8'):
        go('b')
    monkeypatch.undo()
    monkeypatch.setitem(pf.OVERFIT, 'known', 0.0)
    with pytest.raises(FadaError, match='the loss does not fall'):
        go('c', lr=1e-12)
    monkeypatch.undo()
    vlm = nano()
    monkeypatch.setattr('fada.checkpoints.free_bytes', lambda d: 2**20)
    with pytest.raises(FadaError, match='preflight, memory: .*raise --accumulate'):
        finetune(vlm, small_data, ['Femur'], tmp_path / 'd', **QUICK)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, small_data):
    "accelerate with two gloo processes: the loss curve and the adapter of one process at the same batch"
    one = finetune(
        nano(), small_data, ['Femur'], tmp_path / 'one', skip_preflight=True, seed=0, steps=12, batch=4, checks=2
    )
    two = typed(
        'train --data {data} --categories Femur --output {output} --steps 12 --batch 4 --checks 2 '
        '--skip-preflight --device cpu --processes 2 --json --quiet',
        data=small_data,
        output=tmp_path / 'two',
    )
    said = subprocess.run(two, check=True, env=PINNED, capture_output=True, text=True).stdout
    assert json.loads(said)['processes'] == 2
    other = subprocess.run(
        [*two, '--seed', '7'], env=PINNED, capture_output=True, text=True
    )  # what a process complains of is told, once
    assert (
        other.returncode == 1
        and other.stderr.count('holds another run') == len(other.stderr.strip().splitlines()) == 1
    ), other.stderr
    two = json.loads((tmp_path / 'two' / 'adapter' / 'fada.json').read_text())
    assert two['processes'] == 2 and [s for s, _ in two['losses']] == [s for s, _ in one['losses']]
    assert np.allclose([v for _, v in one['losses']], [v for _, v in two['losses']], atol=2e-4)
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / n / 'adapter_model.safetensors') for n in ('one', 'two/adapter'))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['int8', 'nf4'])
def test_qlora(precision, tmp_path, small_data):
    """Quantised weights, gradient checkpointing, parts of a step: the loss falls, the adapter comes back; 8-bit
    optimisers say where they work"""
    vlm = load('blip2-nano', device='cpu', precision=precision, max_new_tokens=8)
    about = finetune(
        vlm,
        small_data,
        ['Femur'],
        tmp_path,
        steps=10,
        batch=8,
        accumulate=2,
        checkpointing=True,
        checks=1,
        validation_images=2,
        lr=5e-3,
    )
    losses = [v for _, v in about['losses']]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) and about['precision'] == precision
    again = load('blip2-nano', tmp_path, device='cpu', precision=precision, max_new_tokens=8)
    assert again.adapter == vlm.adapter
    with pytest.raises(FadaError, match='paged8bit works on a card only'):
        finetune(nano(), small_data, ['Femur'], tmp_path / 'b', optimiser='paged8bit', skip_preflight=True, **QUICK)
    with pytest.raises(FadaError, match='unknown optimiser'):
        finetune(nano(), small_data, ['Femur'], tmp_path / 'c', optimiser='sgd', skip_preflight=True, **QUICK)
