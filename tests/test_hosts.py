"""Machines that ssh reaches: a true sshd on this one, and two network namespaces as two hosts, of which one is
taken away. Skipped where sshd is not installed (Debian: openssh-server) or namespaces are not permitted."""

import getpass, json, os, shutil, socket, subprocess, sys, time
from contextlib import ExitStack, contextmanager
from pathlib import Path
import psutil
import pytest
from commands import one_training
from fada.batch import run_jobs
from fada.settings import FadaError, load_settings
from processes import below
from test_batch import by_state, job, stub

PATH = os.environ['PATH'] + ':/usr/sbin'
SSHD = shutil.which('sshd', path=PATH)
ABSENT = [n for n in ('sshd', 'ssh', 'ssh-keygen') if not shutil.which(n, path=PATH)]
pytestmark = [pytest.mark.fault, pytest.mark.skipif(bool(ABSENT), reason=f'not installed: {", ".join(ABSENT)}')]
SOON = '12s'  # after which a silent connection counts as broken: the least that Dask takes; its own is 30 s

CONF = '''ListenAddress {address}
Port {port}
HostKey {d}/host
AuthorizedKeysFile {d}/me.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
SetEnv OMP_NUM_THREADS=1 FADA_QUIET=1 JUPYTER_RUNTIME_DIR={d}/runtime DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP={soon}
'''


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s:
        return s.getsockname()[1]


@pytest.fixture
def keys(tmp_path):
    "A folder with keys of a host and of a user, and the command that uses them"
    d = tmp_path / 'ssh'
    d.mkdir()
    for k in ('host', 'me'):
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', str(d / k)], check=True)
    if os.getuid() == 0:
        Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)  # where sshd lays its rights down
    return (
        d,
        f'ssh -F none -i {d}/me -o UserKnownHostsFile={d}/known -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR',
    )


@contextmanager
def sshd(d, address='127.0.0.1', port=0, before=()):
    "A server of ssh; its name as a host"
    port = port or free_port()
    conf = d / f'{address}-{port}'
    conf.write_text(CONF.format(d=d, address=address, port=port, soon=SOON))
    with open(d / f'{address}-{port}.log', 'wb') as log:
        p = subprocess.Popen(
            [*before, SSHD, '-D', '-e', '-f', str(conf)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=dict(os.environ, PATH=PATH),
        )
    try:
        yield f'ssh://{getpass.getuser()}@{address}:{port}'
    finally:
        if p.poll() is None:
            for q in [*psutil.Process(p.pid).children(recursive=True), psutil.Process(p.pid)]:
                q.kill()
        p.wait()


def until(happens, seconds=60):
    end = time.monotonic() + seconds
    while not (it := happens()):
        assert time.monotonic() < end, 'it does not happen'
        time.sleep(0.1)
    return it


def answers(ssh, host):
    return lambda: subprocess.run([*ssh.split(), host, 'true'], capture_output=True).returncode == 0


def none_left(tmp_path):
    until(lambda: not [p for p in below(tmp_path) if 'sshd' not in p.name()], 30)


@pytest.mark.slow
def test_a_batch_on_a_machine_of_settings_ini(tmp_path, root, small_data, keys):
    "A worker is started by ssh, trains, and goes with the batch; the second run reaches nobody"
    d, ssh = keys
    fada = one_training(tmp_path, root, small_data)
    with sshd(d) as host:
        (tmp_path / 'settings.ini').write_text(
            f'[cluster]\nhosts = {host}\nssh = {ssh}\ncores = 1\nmemory = 8GB\ncards = 0\n'
        )
        until(answers(ssh, host))
        r = fada()
        assert r.returncode == 0, r.stderr
        assert (
            json.loads(r.stdout)['states'] == dict(done=1)
            and '1 workers started by ssh' in r.stderr
            and '1 workers, 1 slots' in r.stderr
        )
        none_left(tmp_path)
    r = fada()
    assert json.loads(r.stdout)['states'] == dict(reused=1) and 'ssh' not in r.stderr  # nobody is there any more


def test_a_machine_that_cannot_be_used_is_named(tmp_path, keys, monkeypatch):
    """One that ssh does not reach, one without this installation, one that does not see the folder: a sentence
    each, before any job"""
    from fada.cluster import cluster_of

    d, ssh = keys
    out = tmp_path / 'o'
    out.mkdir()
    blind = ['unshare', '-m', 'sh', '-c', f'mount -t tmpfs tmpfs {out} && exec "$@"', 'sh']

    def refused(host, said):
        with (
            pytest.raises(FadaError, match=said),
            cluster_of(
                load_settings(cluster_hosts=host, cluster_ssh=ssh, cluster_cards='0'), say=lambda l: None, folder=out
            ),
        ):
            pass
        none_left(tmp_path)

    refused(f'ssh://root@127.0.0.1:{free_port()}', 'cannot be reached by ssh.*refused')
    with sshd(d) as host:
        until(answers(ssh, host))
        (d / 'me.pub').rename(d / 'other.pub')
        refused(host, 'cannot be reached by ssh.*without a password.*Permission denied')
        (d / 'other.pub').rename(d / 'me.pub')
        with monkeypatch.context() as m:
            m.setattr(sys, 'executable', '/nowhere/python')
            refused(host, 'started no worker.*nowhere/python.*No such file')
    if subprocess.run([*blind, 'true'], capture_output=True).returncode:
        return  # no right to mount
    with sshd(d, before=blind) as host:
        until(answers(ssh, host))
        refused(host, '1 workers do not see the folder of the batch')
    assert not list(out.iterdir())


def ip(*words):
    subprocess.run(['ip', *words], check=True, capture_output=True, env=dict(os.environ, PATH=PATH))


@contextmanager
def namespace(k):
    "A network namespace as a host of its own; its name, its address, the cable's end here"
    name, mine, its, net = (
        f'fada{os.getpid()}-{k}',
        f'fa{os.getpid()}x{k}'[-15:],
        f'fb{os.getpid()}x{k}'[-15:],
        f'10.{77 + os.getpid() % 100}.{k}',
    )
    ip('netns', 'add', name)
    try:
        ip('link', 'add', mine, 'type', 'veth', 'peer', 'name', its)
        ip('link', 'set', its, 'netns', name)
        ip('addr', 'add', f'{net}.1/24', 'dev', mine)
        ip('link', 'set', mine, 'up')
        for words in (
            ('addr', 'add', f'{net}.2/24', 'dev', its),
            ('link', 'set', its, 'up'),
            ('link', 'set', 'lo', 'up'),
        ):
            ip('-n', name, *words)
        yield name, f'{net}.2', mine
    finally:
        ip('netns', 'del', name)  # its end of the cable goes along, and so does ours


def test_one_of_two_hosts_is_taken_away(tmp_path, keys):
    """Two hosts that see this one at different addresses; one loses its power while it works: its job runs on the
    other, and nothing is lost"""
    import dask
    from fada.cluster import cluster_of

    d, ssh = keys
    said = []
    nb = stub(tmp_path)
    jobs = [job(tmp_path, f'j{k}', notebook=nb, n=40, pause=0.05) for k in range(3)]
    with ExitStack() as stack, dask.config.set({'distributed.comm.timeouts.tcp': SOON}):
        try:
            found = [stack.enter_context(namespace(k)) for k in (1, 2)]
        except (subprocess.CalledProcessError, FileNotFoundError) as e:
            pytest.skip(f'network namespaces are not permitted: {getattr(e, "stderr", e)}')
        hosts = [stack.enter_context(sshd(d, a, 22, ['ip', 'netns', 'exec', n])) for n, a, _ in found]
        for h in hosts:
            until(answers(ssh, h))

        def running():
            pids = subprocess.run(['ip', 'netns', 'pids', found[0][0]], capture_output=True, text=True).stdout.split()
            return [psutil.Process(int(p)) for p in pids if psutil.pid_exists(int(p))]

        cut = []

        def look():
            kernels = [p for p in running() if 'ipykernel_launcher' in p.cmdline()] if not cut else []
            if kernels and any((j.part / 'answers.jsonl').exists() for j in jobs):
                ip('link', 'set', found[0][2], 'down')
                cut.append(True)  # nothing that ends there is heard of here
                for p in running():
                    p.kill()
            c.look()

        (tmp_path / 'out').mkdir()
        s = load_settings(
            cluster_hosts=', '.join(hosts),
            cluster_ssh=ssh,
            cluster_cards='0',
            cluster_memory='4GB',
            cluster_cores='1',
        )
        with cluster_of(s, say=said.append, folder=tmp_path / 'out') as c:
            assert c.slots == 2 and c.threads == 1
            results = run_jobs(jobs, c.slots, executor=c.executor, look=look, threads=c.threads)
        assert cut and by_state(results) == {f'j{k}': 'done' for k in range(3)}
        assert [l for l in said if f'tcp://{found[0][1]}' in l and 'gone, 1 workers left' in l], said
    for j in jobs:
        assert [json.loads(l)[1] for l in (j.folder / 'answers.jsonl').read_text().splitlines()] == list(range(40))
    none_left(tmp_path)
