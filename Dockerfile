# diffusion-lit on NVIDIA GPUs. torch's wheels bring CUDA; the host needs NVIDIA's driver and container toolkit.
#   docker build -t diffusion-lit .
#   docker run --gpus all --shm-size 8g -v "$PWD:/work" diffusion-lit fit --config edm_cifar10 --data.init_args.root FOLDER
FROM python:3.12-slim
WORKDIR /opt/diffusion-lit
COPY . .
RUN python -m pip install --no-cache-dir --constraint requirements.lock '.[completion,pretrained,wandb]' && diffusion-lit --version
WORKDIR /work
ENV XDG_CACHE_HOME=/work/.cache
ENTRYPOINT ["diffusion-lit"]
CMD ["doctor"]
