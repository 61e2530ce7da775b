"One evaluation in parts: the same bytes as in one piece, nothing lost, and half of one is no evaluation."

import json, subprocess
import pandas as pd
import pytest
from commands import typed
from fada.evaluate import evaluate
from fada.settings import FadaError, read_json, write_json
from fada.shards import LoggedModel
from fada.vlm import load

ASKED = dict(split='train', control_images=20, seed=3)  # three batches of images, two of the controls'
PROVENANCE = ('time', 'seconds', 'versions')


def records(folder):
    "The log's lines as bytes, without provenance"
    kept = [
        {k: v for k, v in json.loads(l).items() if k not in PROVENANCE} for l in (folder / 'answers.jsonl').open()
    ]
    return [json.dumps(r).encode() for r in kept]


def scores(folder):
    return pd.read_parquet(folder / 'scores.parquet').drop(columns='seconds', errors='ignore')


def told(folder):
    "metrics.json without what tells of time and machine"
    m = read_json(folder / 'metrics.json')
    own = ('made', 'versions', 'seconds', 'peak_bytes', 'seconds_per_question', 'shards')
    return {k: v for k, v in m.items() if k not in own}


@pytest.fixture(scope='module')
def parts(small_data, tmp_path_factory):
    "An evaluation in one piece, and the same in four parts, of which one has no image"
    d = tmp_path_factory.mktemp('shards')
    nano = load('blip2-nano')
    evaluate(nano, small_data, d / 'whole', **ASKED)
    for k in range(1, 5):
        evaluate(nano, small_data, d / f'part{k}', shard=f'{k}/4', **ASKED)
        write_json(d / f'part{k}' / 'config.json', dict(load_seconds=1.0, load_grown_bytes=2, weights_bytes=3))
    return d


def merge(data, d, out, ks=(1, 2, 3, 4), **other):
    folders = [d / f'part{k}' for k in ks]
    return evaluate(
        LoggedModel(load('blip2-nano').spec, folders), data, d / out, shards=folders, **{**ASKED, **other}
    )


def test_parts_make_the_whole_byte_for_byte(small_data, parts):
    m = merge(small_data, parts, 'merged', ks=(3, 1, 4, 2))
    lines = records(parts / 'merged')
    assert len(lines) > 800 and lines == records(parts / 'whole')
    pd.testing.assert_frame_equal(scores(parts / 'merged'), scores(parts / 'whole'))
    assert told(parts / 'merged') == told(parts / 'whole')
    asked = [read_json(parts / f'part{k}' / 'shard.json')['coverage']['asked'] for k in range(1, 5)]
    assert sum(asked) == len(lines) and all(asked[:3]) and asked[3] == 0 and m['shards'] == 4
    assert not (parts / 'part1' / 'metrics.json').exists()  # a part has no scores to compare


def test_half_an_evaluation_has_no_score(small_data, parts):
    with pytest.raises(FadaError, match='parts 1/4, 2/4, 4/4 do not make a whole'):
        merge(small_data, parts, 'x', ks=(1, 2, 4))
    with pytest.raises(FadaError, match='answered in no part'):
        merge(small_data, parts, 'x', seed=4)  # another sample of the controls
    log = parts / 'part2' / 'answers.jsonl'
    lines = log.read_text().splitlines(True)
    try:
        log.write_text(''.join(lines[1:]))
        with pytest.raises(FadaError, match='1 images or more have questions'):
            merge(small_data, parts, 'x')
        failed = dict(json.loads(lines[0]), error='no reply in time', stage='answer', text='')
        # what failed was asked: it counts as failed
        log.write_text(''.join([json.dumps(failed) + '\n', *lines[1:]]))
        assert merge(small_data, parts, 'failed')['coverage']['failed'] == 1
    finally:
        log.write_text(''.join(lines))
    assert not (parts / 'x' / 'metrics.json').exists()


@pytest.mark.slow
def test_by_command(small_data, tmp_path, root):
    "A part by command, and merged by command; a part that is none is one sentence, before any model is loaded"
    fada = lambda *w: subprocess.run(
        [
            *typed(
                'evaluate --model blip2-nano --data {data} --json --quiet --control-images 2 --images 4',
                data=small_data,
            ),
            *w,
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    r = fada('--shard', '1/1', '--out', str(tmp_path / 'p'))
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)['kind'] == 'fada shard'
    r = fada('--out', str(tmp_path / 'all'), '--merge', str(tmp_path / 'p'))
    assert r.returncode == 0, r.stderr
    assert (
        json.loads(r.stdout)['coverage']['failed'] == 0
        and read_json(tmp_path / 'all' / 'config.json')['load_seconds'] > 0
    )
    r = fada('--shard', '3/2', '--out', str(tmp_path / 'y'))
    assert r.returncode == 1 and 'k/n' in r.stderr and 'Traceback' not in r.stderr
