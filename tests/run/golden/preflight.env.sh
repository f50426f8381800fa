# Every variable that janus-cluster exports on the nodes, and why. job.sbatch sources this file.
# Made from the job file; to change a value, set it under environment.variables there and submit again.
# shellcheck shell=sh

# InfiniBand or nothing. Without it NCCL falls back to TCP sockets in silence when the HCAs are not usable.
# [templates/env/h800-ib.yaml]
export NCCL_NET=IB

# The time-out of one send is 4.096 µs·2^22, about 2 min with 7 retries. 20 (the default, 30 s) is shorter than
# a switch reroute; 30 would hang for hours. [templates/env/h800-ib.yaml]
export NCCL_IB_TIMEOUT=22

# Warnings and the NCCL version; INFO of 16 ranks fills the log of every step. [templates/env/h800-ib.yaml]
export NCCL_DEBUG=WARN

# The flight recorder keeps the last 2000 collectives of each rank, so that a hang can be traced to the rank
# that did not come. [templates/env/h800-ib.yaml]
export TORCH_FR_BUFFER_SIZE=2000

# The flight recorder is written out when a collective times out. [templates/env/h800-ib.yaml]
export TORCH_NCCL_DUMP_ON_TIMEOUT=1

# DETAIL checks every collective on all ranks before it runs and slows each step. [templates/env/h800-ib.yaml]
export TORCH_DISTRIBUTED_DEBUG=OFF

# Image counts differ from sample to sample; expandable segments keep the allocator from fragmenting 80 GB. Name
# used since torch 2.9. [templates/env/h800-ib.yaml]
export PYTORCH_ALLOC_CONF=expandable_segments:True

# The same under the name that torch before 2.9 reads; newer torch reads it only if the other is absent.
# [templates/env/h800-ib.yaml]
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# Eight CPU threads per rank for image work, fewer when Slurm gives a rank fewer CPUs. torchrun would set 1.
# [templates/env/h800-ib.yaml]
export OMP_NUM_THREADS=8

# The loader forks its workers; tokenizers' own threads would make each worker warn and run single-threaded
# anyway. [templates/env/h800-ib.yaml]
export TOKENIZERS_PARALLELISM=false

# Lines reach the log when they are written, also the last ones before a crash. [templates/env/h800-ib.yaml]
export PYTHONUNBUFFERED=1
