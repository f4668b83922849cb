# Tafkir on the processor, by the README's steps: docker build -t tafkir .       How to use it: docs/install.md
FROM python:3.11-slim-bookworm

# The compiler stays: kernels are built for one processor, and the image may run on another.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home tafkir \
    && install -d -o tafkir /opt/tafkir /work

USER tafkir
WORKDIR /opt/tafkir
ENV PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=/opt/tafkir/cache PATH=/opt/tafkir/.venv/bin:$PATH
COPY --chown=tafkir Makefile README.md LICENSE pyproject.toml constraints.txt ./
COPY --chown=tafkir src src
COPY --chown=tafkir recipes recipes
RUN make install

WORKDIR /work
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"
ENTRYPOINT ["tafkir"]
CMD ["serve", "base-tiny", "--host", "0.0.0.0"]
