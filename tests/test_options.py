"""Every option of every command, with values that nobody should type: one line that names it, before the work."""
import dataclasses
import inspect

import pytest
import torch

from diffusion_papers import __main__ as program
from diffusion_papers.core import training
from diffusion_papers.core.configs import Config
from diffusion_papers.core.registry import paper, papers

SMALL = {  # a quick model of each paper
    "genie": {"diffusion.mlp.width": 8, "diffusion.mlp.blocks": 1, "diffusion.mlp.fourier": 4}, "dfno": {}, "i2sb": {"film.width": 8},
    "dpdm": {"perceptron.width": 8, "public": True}, "ddo": {"points": 8, "network.width": 4, "network.modes": 2, "network.blocks": 1}}
WRONG = ("text", "-1", "0", "1" + 20 * "0", "nan", "inf", "-inf", "1e999", "0.5", "", "()", "(1,)", "(1, 'a')", "((1, 2), 3)", "[-1]",
         "(0.5,)", "none", "true", "{}", "(" * 300, "1j")


def outcome(words, capsys):
    "Exit code, and the lines of the error stream."
    try: code = program.main(list(map(str, words)))
    except SystemExit as stop: code = stop.code
    return code, capsys.readouterr().err


def check(words, name, capsys):
    "Accepted, or refused in one line that names the option."
    code, err = outcome(words, capsys)
    lines = [line for line in err.splitlines() if "error:" in line]
    told = " ".join(map(str, words))
    assert "Traceback" not in err and code in (0, 1, 2), f"{told}\n{err}"
    assert (code == 0) == (not lines), f"{told}\n{err}"
    assert code == 0 or len(lines) == 1 and name.lower() in lines[0].lower(), f"{told}\n{err}"
