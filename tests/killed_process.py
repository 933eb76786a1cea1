"""One process of a run that torchrun starts: on the first attempt the second one is killed amid its eleventh step."""

import os
import signal
import sys
from pathlib import Path

import torch
from team_setup import stage, trained
from training_setup import student

from onejump.join import join

torch.set_num_threads(1)
team, network, passes = join("cpu"), type(student().net), 0
forward = network.forward


def dies(self, *args):
    global passes
    passes += 1
    if passes == 20 and team.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args)


network.forward = dies
trained(team, Path(sys.argv[1]), stage("ect"))
team.leave()
