"""A batch through a true Slurm of one node, started for the test; skipped where Slurm is not installed (Debian:
slurmctld slurmd slurm-client munge)."""

import json, os, pwd, shutil, signal, socket, subprocess, time
import pytest
from commands import one_training

NEEDED = ('slurmctld', 'slurmd', 'munged', 'sbatch', 'sinfo')
ABSENT = [n for n in NEEDED if not shutil.which(n, path=os.environ['PATH'] + ':/usr/sbin')]
pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f'not installed: {", ".join(ABSENT)}'),
    pytest.mark.skipif(
        os.name != 'posix' or os.getuid() != 0, reason='Slurm starts jobs as their user: root alone can start it'
    ),
]

CONF = '''ClusterName=one
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge/s
SlurmctldPort={port}
SlurmdPort={other}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
NodeName={host} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=night Nodes={host} Default=YES MaxTime=INFINITE State=UP
'''


def free_ports(n):
    held = [socket.create_server(('127.0.0.1', 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "munge, controller and one node; the folder with their configuration"
    d = tmp_path_factory.mktemp('slurm')
    port, other = free_ports(2)
    host = socket.gethostname().split('.')[0]
    for n in ('state', 'spool', 'munge'):
        (d / n).mkdir()
    (d / 'slurm.conf').write_text(CONF.format(d=d, port=port, other=other, host=host))
    (d / 'munge' / 'key').write_bytes(os.urandom(1024))
    if 'munge' in (u.pw_name for u in pwd.getpwall()):
        shutil.chown(d / 'munge', 'munge')
        shutil.chown(d / 'munge' / 'key', 'munge')
    (d / 'munge' / 'key').chmod(0o400)
    for p in (d, *list(d.parents)[:2]):
        p.chmod(0o755)  # munge has a user of its own
    procs, path = [], os.environ['PATH'] + ':/usr/sbin'
    env = dict(os.environ, PATH=path, SLURM_CONF=str(d / 'slurm.conf'))

    def start(*words, **kw):
        procs.append(
            subprocess.Popen(
                words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **kw
            )
        )

    start(
        'munged',
        '--foreground',
        f'--key-file={d}/munge/key',
        f'--socket={d}/munge/s',
        f'--pid-file={d}/munge/pid',
        f'--log-file={d}/munge/log',
        f'--seed-file={d}/munge/seed',
        '--force',
        user='munge',
        group='munge',
        extra_groups=[],
    )
    start('slurmctld', '-D', '-f', str(d / 'slurm.conf'))
    start('slurmd', '-D', '-f', str(d / 'slurm.conf'))
    for _ in range(100):
        r = subprocess.run(['sinfo', '-h', '-o', '%T'], env=env, capture_output=True, text=True, timeout=60)
        if r.stdout.strip() == 'idle':
            break
        time.sleep(0.3)
    else:
        raise AssertionError(f'{r}\n{(d / "slurmctld.log").read_text()[-2000:]}')
    yield d, env
    subprocess.run(['scancel', '--user=root'], env=env, timeout=60)
    for p in reversed(procs):
        p.send_signal(signal.SIGTERM)
    for p in procs:
        try:
            p.wait(20)
        except subprocess.TimeoutExpired:
            p.kill()


def test_a_batch_asks_slurm_for_its_workers(slurm, tmp_path, root, small_data):
    """Two workers are submitted, a training runs in one of them, they leave the queue with the batch; the second
    run asks for none"""
    d, env = slurm
    fada = one_training(tmp_path, root, small_data, env)
    (tmp_path / 'settings.ini').write_text(
        '[cluster]\njobqueue = slurm\nqueue = night\nworkers = 2\ncores = 1\nmemory = 1500MB\ncards = 0\nhours = 1\n'
    )
    r = fada()
    assert r.returncode == 0, r.stderr + (d / 'slurmd.log').read_text()[-2000:]
    assert (
        json.loads(r.stdout)['states'] == dict(done=1)
        and '2 workers asked of Slurm' in r.stderr
        and '2 slots' in r.stderr
    )
    jobs = subprocess.run(['scontrol', 'show', 'jobs', '-o'], env=env, capture_output=True, text=True).stdout
    assert jobs.count('JobName=dask-worker') == 2 and 'Partition=night' in jobs
    for _ in range(60):
        if not (
            left := subprocess.run(
                ['squeue', '-h', '-t', 'RUNNING,PENDING'], env=env, capture_output=True, text=True
            ).stdout.strip()
        ):
            break
        time.sleep(0.5)
    assert not left
    again = fada()
    assert json.loads(again.stdout)['states'] == dict(reused=1) and 'asked of Slurm' not in again.stderr


def test_a_training_of_two_processes_by_its_script(slurm, tmp_path, root, small_data):
    """The script that the grid's job gives is taken by sbatch and trains one adapter with two processes, through
    accelerate's launcher"""
    from fada.cluster import node_script
    from fada.grid import grid_jobs, read_grid
    from fada.settings import load_settings, read_json

    d, env = slurm
    (tmp_path / 'nbs').symlink_to(root / 'nbs')
    grid = tmp_path / 'g.toml'
    grid.write_text(
        f'models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\ndata = "{small_data}"\ntasks = ["train"]\n'
        '[parameters.train]\nsteps = 2\nbatch = 4\nimages = 6\nskip_preflight = true\n'
    )
    (job,) = grid_jobs(read_grid(grid), tmp_path / 'o')
    (port,) = free_ports(1)
    s = load_settings(
        cluster_queue='night', cluster_cards='0', cluster_cores=2, cluster_memory='3GB', cluster_hours=1
    )
    script = tmp_path / 'train.sh'
    script.write_text(node_script(job, s, nodes=1, processes=2, port=port))
    r = subprocess.run(
        ['sbatch', '--wait', '--output', str(tmp_path / 'log'), str(script)],
        cwd=root,
        env=dict(env, OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert r.returncode == 0, r.stderr + (tmp_path / 'log').read_text()[-2000:]
    about = read_json(job.folder / 'adapter' / 'fada.json')
    assert about['processes'] == 2 and (job.folder / 'adapter' / 'adapter_model.safetensors').is_file()
