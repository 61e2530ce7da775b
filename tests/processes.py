"What runs on this machine, for tests and benches of batches."

import os
import psutil


def below(folder):
    "Processes whose command line names `folder`, but for this one"
    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and str(folder) in ' '.join(p.cmdline()) and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except psutil.Error:
            pass  # gone meanwhile
    return found
