"""Configurations of nginx and HAProxy that stand before replicas of an OpenAI server: one dies, and nobody notices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tafkir.errors import RecipeError

__all__ = ["PROXIES", "render_proxy"]

PROXIES = ("nginx", "haproxy")

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
# What changes or measures one replica is no business of those who reach the proxy.
_OWN_PATHS = ("/metrics", "/update_weights_from_disk", "/get_model_info", "/collective_rpc", "/reset_prefix_cache")
_BUSY = json.dumps(
    {"error": {"message": "no replica answers; try again soon", "type": "server_error", "param": None, "code": "down"}}
)

_NGINX = """\
# By `tafkir plan proxy nginx`. To start it: mkdir -p run && nginx -p run -c $PWD/THIS_FILE
daemon off;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    # `up` names every replica that was tried, in order; more than one is a request that was saved.
    log_format replicas '$time_iso8601 $request_method $uri $status up=$upstream_addr was=$upstream_status '
                        's=$request_time id=$sent_http_x_request_id';
    access_log access.log replicas;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;

    upstream replicas {{
        zone replicas 128k;
        least_conn;
        # This nginx asks nobody for its health (nginx Plus does): a replica that fails three times within two seconds,
        # by refusing, breaking off, or a 503 of /ready's kind, is left alone for two. A full queue counts, too.
{servers}
        keepalive 64;
    }}
    # The same without memory, for when all of them are left alone: one may be back already.
    upstream anyway {{
{anyway}
    }}
    server {{
        listen {listen};
        client_max_body_size 64m;
        # In memory, whole, so that it can be sent again.
        client_body_buffer_size 4m;
        proxy_request_buffering on;
        # Tokens go on as they come.
        proxy_buffering off;
        gzip off;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_connect_timeout 1s;
        proxy_send_timeout 30s;
        proxy_read_timeout {answer_s}s;
        # An answer that has not begun is asked for elsewhere, POST or not; one that has begun never is.
        proxy_next_upstream error timeout invalid_header http_503 non_idempotent;
        proxy_next_upstream_tries 3;
        recursive_error_pages on;
        error_page 504 = @down;
        location / {{
            error_page 502 = @anyway;
            proxy_pass http://replicas;
        }}
        location @anyway {{
            error_page 502 = @down;
            proxy_pass http://anyway;
        }}
{own}
        location @down {{
            internal;
            default_type application/json;
            add_header Retry-After 2 always;
            return 503 '{busy}';
        }}
    }}
}}
"""

_HAPROXY = """\
# By `tafkir plan proxy haproxy`. To start it: haproxy -f THIS_FILE
global
    log stdout format raw local0
    maxconn 1000
    # A request of up to so many bytes can be sent again.
    tune.bufsize 131072

defaults
    mode http
    timeout connect 1s
    timeout client {answer_s}s
    timeout server {answer_s}s
    timeout http-request 20s
    timeout http-keep-alive 60s
    timeout check 2s
    option http-keep-alive
    # Who leaves is no longer computed for.
    option abortonclose

frontend clients
    bind {listen}
    log global
    # rc counts what was sent again, with + where that was to another replica.
    log-format "%HM %HP %ST to=%s rc=%rc ms=%Tr/%Ta %ts"
    option http-buffer-request
    http-request return status 404 if {{ path {own} }}
    default_backend replicas

backend replicas
    balance leastconn
    # A replica that loads, drains, has failed or stands still says so, and gets nothing more.
    option httpchk GET /ready
    http-check expect status 200
    # An answer that has not begun is asked for elsewhere, POST or not; one that has begun never is.
    retry-on conn-failure empty-response junk-response 503
    retries 2
    option redispatch 1
{errors}
    default-server check inter 1s fastinter 200ms downinter 200ms fall 2 rise 1
{servers}

# Which replicas are up, and how often requests were sent again: a page, and /metrics for Prometheus.
frontend status
    bind 127.0.0.1:{status_port}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    stats enable
    stats uri /
"""


def render_proxy(
    kind: str, replicas: Sequence[str], *, listen: str = "127.0.0.1:8000", answer_s: int = 3600, status_port: int = 8404
) -> str:
    """The whole configuration file of a proxy before servers that have `/ready`, as Tafkir's and SGLang's have.

    Nothing is buffered on the way back. A request whose answer has not begun is sent to another replica; a 503 or 429
    comes through with its `Retry-After`.

    Args:
        kind: one of `PROXIES`.
        replicas: their addresses, HOST:PORT.
        listen: the proxy's own address.
        answer_s: longest silence of a replica that still thinks, in seconds.
        status_port: of HAProxy's page and metrics, on this machine alone.

    Raises:
        RecipeError: another kind, no replica, the same one twice, or something that is no address.
    """
    if kind not in PROXIES:
        raise RecipeError(f"no configuration for {kind!r}", where="proxy", expected=" or ".join(PROXIES))
    if not replicas or len(set(replicas)) < len(replicas):
        what = "a replica is named twice" if replicas else "no replica"
        raise RecipeError(what, where="proxy", expected="distinct addresses", fix="127.0.0.1:8001 127.0.0.1:8002")
    for address in (*replicas, listen):
        found = _ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found[2]) < 65536:
            raise RecipeError("no address", where=address, expected="HOST:PORT, such as 127.0.0.1:8001")
    if kind == "nginx":
        servers = "\n".join(f"        server {address} max_fails=3 fail_timeout=2s;" for address in replicas)
        own = "\n".join(f"        location = {path} {{ return 404; }}" for path in _OWN_PATHS)
        anyway = "\n".join(f"        server {address} max_fails=0;" for address in replicas)
        return _NGINX.format(servers=servers, anyway=anyway, listen=listen, answer_s=answer_s, own=own, busy=_BUSY)
    servers = "\n".join(f"    server r{number} {address}" for number, address in enumerate(replicas, 1))
    errors = "\n".join(
        f"    http-error status {status} content-type application/json string '{_BUSY}' hdr Retry-After 2"
        for status in (502, 503, 504)
    )
    fields = {"servers": servers, "listen": listen, "answer_s": answer_s, "own": " ".join(_OWN_PATHS), "errors": errors}
    return _HAPROXY.format(**fields, status_port=status_port)
