# Every variable that janus-cluster exports on the nodes, and why. job.sbatch sources this file.
# Made from the job file; to change a value, set it under environment.variables there and submit again.
# shellcheck shell=sh

# DeepSpeed asks for the CPU instead of probing for GPUs and their compilers. [templates/env/cpu.yaml]
export DS_ACCELERATOR=cpu

# Nothing may find a GPU, also where Slurm hands out pretend ones. [templates/env/cpu.yaml]
export CUDA_VISIBLE_DEVICES=''

# Several ranks share few cores here; one thread each is fastest and makes runs repeatable.
# [templates/env/cpu.yaml]
export OMP_NUM_THREADS=1

# As on GPUs, where torch's gloo has a flight recorder (torch 2.13 has). [templates/env/cpu.yaml]
export TORCH_FR_BUFFER_SIZE=2000

# DETAIL checks every collective on all ranks before it runs and slows each step. [templates/env/cpu.yaml]
export TORCH_DISTRIBUTED_DEBUG=OFF

# The loader forks its workers; tokenizers' own threads would make each worker warn and run single-threaded
# anyway. [templates/env/cpu.yaml]
export TOKENIZERS_PARALLELISM=false

# Lines reach the log when they are written, also the last ones before a crash. [templates/env/cpu.yaml]
export PYTHONUNBUFFERED=1
