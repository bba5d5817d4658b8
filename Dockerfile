# An image with the project and its dependencies, for NVIDIA GPUs; the CUDA libraries come with JAX's wheels, the driver from
# the host. Checkpoints and data belong on mounted folders or in buckets.
#
#   docker build -t lvm .                                 CUDA 13; --build-arg EXTRAS=gpu12,video,text,serve for CUDA 12
#   docker run --gpus all --shm-size=8g -v /data:/data lvm \
#       python -u -m EasyLM.models.llama.llama_train --flagfile=configs/7b_finetune.flags ...
#
# Apptainer, on clusters without Docker:  apptainer build lvm.sif docker-daemon://lvm:latest
#                                         srun apptainer exec --nv -B /data lvm.sif python -u -m EasyLM...
FROM python:3.12-slim
ARG EXTRAS=gpu,video,text,serve
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /lvm
# Dependencies first: a change of the code alone does not install them again.
COPY pyproject.toml setup.py README.md LICENSE ./
COPY EasyLM/__init__.py EasyLM/__init__.py
RUN pip install --no-cache-dir ".[$EXTRAS]" && pip uninstall -y EasyLM-LVM
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
CMD ["bash"]
