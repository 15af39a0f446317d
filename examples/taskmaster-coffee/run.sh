#!/usr/bin/env bash
# SFT, reward, RL and evaluation on Taskmaster Coffee, with the recipe taskmaster-coffee.
# `perl recipes show taskmaster-coffee` says what to put into data/taskmaster-coffee first.
# Add --load-in-4bit to each command for a 4-bit base.
set -euo pipefail
cd "$(dirname "$0")/../.."
perl sft --recipe taskmaster-coffee
perl reward --recipe taskmaster-coffee
perl eval --recipe taskmaster-coffee --model runs/taskmaster-coffee/reward
perl rl --recipe taskmaster-coffee
perl eval --recipe taskmaster-coffee
