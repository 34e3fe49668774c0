"""The fake server's endpoints: paths, keys, bodies and the words of its answers."""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web

from fakes.calls import Call, InvalidError, Json, RefusedError, read_call
from fakes.manager import Manager
from fakes.scheduler import Update


def answer(success: bool, message: str, **more: Any) -> web.Response:
    status = HTTPStatus.OK if success else HTTPStatus.BAD_REQUEST
    return web.json_response({"success": success, "message": message} | more, status=status)


def need(body: Json, **kinds: type) -> None:
    """InvalidError where a key is missing or of another type."""
    for name, kind in kinds.items():
        if name not in body:
            raise InvalidError(f"Field required: {name}")
        if not isinstance(body[name], kind):
            raise InvalidError(f"Input should be a valid {kind.__name__}: {name}")


def update_of(body: Json) -> Update:
    return Update(body.get("flush_cache", True), body.get("weight_version"))


class Api:
    """The endpoints. Those of ``control`` take the admin key where there is one, the rest the user key."""

    def __init__(self, options: argparse.Namespace, manager: Manager) -> None:
        self.options, self.manager, self.scheduler = options, manager, manager.scheduler
        self.since, self._background = manager.since, set[asyncio.Task[None]]()
        control: dict[str, Callable[[web.Request], Any]] = {
            "/abort_request": self.abort,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/flush_cache": self.flush,
            "/update_weights_from_tensor": self.from_tensor,
            "/update_weights_from_disk": self.from_disk,
            "/init_weights_update_group": self.init_group,
            "/update_weights_from_distributed": self.from_distributed,
            "/destroy_weights_update_group": self.destroy_group,
            "/update_weight_version": self.set_version,
        }
        if self.since >= (0, 5, 21):
            control |= {"/begin_weight_update": self.begin, "/end_weight_update": self.end}
        guarded = ("/server_info", "/get_server_info") if options.guarded else ()
        self.open = ("/metrics", "/health")
        self.closed = ("/health_generate",) if options.guarded else ()
        self.control = frozenset((*control, *guarded))
        self.app = web.Application(middlewares=[self.guard], client_max_size=2**31)
        for path, handler in control.items():
            self.app.router.add_post(path, handler)
        self.app.router.add_get("/flush_cache", self.flush)
        self.app.router.add_post("/generate", self.generate)
        reads: dict[str, Callable[[web.Request], Any]] = {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/model_info": self.model_info,
            "/get_model_info": self.model_info,
            "/server_info": self.server_info,
            "/get_server_info": self.server_info,
            "/v1/models": self.models,
        }
        if options.enable_metrics:
            reads["/metrics"] = self.metrics
        for path, handler in reads.items():
            self.app.router.add_get(path, handler)

    @web.middleware
    async def guard(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        """Keys first, then whatever goes wrong in the words of FastAPI."""
        if not self._allowed(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            response: web.StreamResponse = await handler(request)
            return response
        except RefusedError as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        except InvalidError as error:
            body = {"object": "error", "message": str(error), "type": "Bad Request", "param": None, "code": 400}
            return web.json_response(body, status=400)
        except web.HTTPException as error:
            return web.json_response({"detail": error.reason}, status=error.status)

    def _allowed(self, request: web.Request) -> bool:
        if request.path.startswith(self.open) and request.path not in self.closed:
            return True
        key = self.options.api_key
        if request.path in self.control and self.options.admin_api_key:
            key = self.options.admin_api_key
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return not key or (scheme.lower() == "bearer" and token == key)

    async def body(self, request: web.Request) -> Json:
        try:
            body = json.loads(await request.text())
        except json.JSONDecodeError as error:
            raise InvalidError(f"JSON decode error: {error}") from error
        if not isinstance(body, dict):
            raise InvalidError("Input should be a valid dictionary")
        return body

    # /generate

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await self.body(request)
        if not body.get("stream"):
            async with contextlib.aclosing(self.manager.generate(read_call(body, self.manager.encode))) as answers:
                return web.json_response(await anext(answers))
        try:
            call, refused = read_call(body, self.manager.encode), ""
        except RefusedError as error:
            call, refused = Call([], single=True, samples=1), str(error)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            if refused:
                raise RefusedError(refused)
            async with contextlib.aclosing(self.manager.generate(call)) as answers:
                async for out in answers:
                    await response.write(b"data: " + json.dumps(out, ensure_ascii=False).encode() + b"\n\n")
        except RefusedError as error:
            words = {"message": str(error), "type": "invalid_request_error", "code": 400, "retryable": False}
            await response.write(b"data: " + json.dumps({"error": words}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        task = asyncio.create_task(self.manager.abort_later([item.rid for item in call.items]))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        await response.write_eof()
        return response

    # Control

    async def abort(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        self.manager.abort(body.get("rid") or "", bool(body.get("abort_all", False)))
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        mode = (await self.body(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise InvalidError("Input should be 'abort', 'retract' or 'in_place'")
        await self.manager.pause(mode)
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await self.body(request)
        await self.manager.resume()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def flush(self, request: web.Request) -> web.Response:
        try:
            seconds = float(request.query.get("timeout", "0"))
        except ValueError as error:
            raise InvalidError("Input should be a valid number: timeout") from error
        success, message = await self.manager.flush(seconds)
        if success:
            return web.Response(
                text="Cache flushed.\nPlease check backend logs for more details. "
                "(When there are running or waiting requests, the operation will not be performed.)\n"
            )
        return web.Response(text=message or "Flush cache failed.\n", status=400)

    async def begin(self, request: web.Request) -> web.Response:
        await self.body(request)
        return answer(*await self.manager.exclusively(self.scheduler.begin))

    async def end(self, request: web.Request) -> web.Response:
        await self.body(request)
        return answer(*await self.manager.exclusively(self.scheduler.end))

    async def _update(self, body: Json, command: Callable[[Update], tuple[bool, str]]) -> tuple[bool, str]:
        if body.get("abort_all_requests", False):
            self.manager.abort("", everything=True)
        update = update_of(body)
        done = await self.manager.exclusively(lambda: command(update))
        return self.manager.updated(*done, update.version)

    async def from_tensor(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        need(body, serialized_named_tensors=list)
        try:
            payloads = [base64.b64decode(text, validate=True) for text in body["serialized_named_tensors"]]
        except (binascii.Error, TypeError) as error:
            raise InvalidError(f"serialized_named_tensors: {error}") from error
        load_format = body.get("load_format")
        return answer(*await self._update(body, lambda u: self.scheduler.from_tensor(payloads[0], load_format, u)))

    async def from_disk(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        need(body, model_path=str)
        success, message = await self._update(body, lambda u: self.scheduler.from_disk(body["model_path"], u))
        if success:
            self.manager.model_path = body["model_path"]
        return answer(success, message, num_paused_requests=0)

    async def init_group(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        need(body, master_address=str, master_port=int, rank_offset=int, world_size=int)
        return answer(*await self.manager.ask(lambda: self.scheduler.init_group(body)))

    async def destroy_group(self, request: web.Request) -> web.Response:
        name = (await self.body(request)).get("group_name", "weight_update_group")
        return answer(*await self.manager.ask(lambda: self.scheduler.destroy_group(name)))

    async def from_distributed(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        need(body, names=list, dtypes=list, shapes=list)
        return answer(*await self._update(body, lambda u: self.scheduler.from_distributed(body, u)))

    async def set_version(self, request: web.Request) -> web.Response:
        body = await self.body(request)
        need(body, new_version=str)
        version = body["new_version"]
        if body.get("abort_all_requests", True):
            self.manager.abort("", everything=True)
        await self.manager.ask(lambda: self.scheduler.set_version(version))
        self.manager.weight_version = version
        return answer(True, f"Weight version updated to {version}", new_version=version)

    # Reads

    async def health(self, request: web.Request) -> web.Response:
        if self.options.guarded:  # no token is made
            return web.Response(status=503 if self.manager.leaving else 200)
        return await self.health_generate(request)

    async def health_generate(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if await self.manager.healthy() else 503)

    async def model_info(self, request: web.Request) -> web.Response:
        config = vars(self.scheduler.engine.model.config)
        info = {
            "model_path": self.manager.model_path,
            "served_model_name": self.manager.model_path,
            "tokenizer_path": self.options.model_path,
            "is_generation": True,
            "weight_version": self.manager.weight_version,
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
        }
        return web.json_response(info)

    async def server_info(self, request: web.Request) -> web.Response:
        """The flags as they were given; the weight version of now is in internal_states (and from 0.5.21 not above)."""
        options = vars(self.options) | {"eos": sorted(self.options.eos)}
        for own in ("sglang_version", "step_seconds", "linger_seconds", "guarded", "positions", "eos"):
            options.pop(own)
        now = options | {"weight_version": self.manager.weight_version}
        ceiling = min(self.options.context_length, self.options.max_total_tokens)
        info = (options if self.since >= (0, 5, 21) else now) | {
            "status": "ready",
            "max_total_num_tokens": self.options.max_total_tokens,
            "max_req_input_len": ceiling - 6,
            "internal_states": [now | {"effective_max_running_requests_per_dp": self.options.max_running_requests}],
            "version": self.options.sglang_version,
        }
        return web.json_response(info)

    async def models(self, request: web.Request) -> web.Response:
        name, length = self.manager.model_path, self.options.context_length
        model = {"id": name, "object": "model", "owned_by": "sglang", "root": name, "max_model_len": length}
        return web.json_response({"object": "list", "data": [model]})

    async def metrics(self, request: web.Request) -> web.Response:
        scheduler = self.scheduler
        values = {
            "num_running_reqs": len(scheduler.running),
            "num_queue_reqs": len(scheduler.waiting),
            "generation_tokens_total": scheduler.tokens,
            "num_retracted_reqs": scheduler.retracted,
        }
        label = f'{{model_name="{self.options.model_path}"}}'
        return web.Response(text="".join(f"sglang:{name}{label} {value}\n" for name, value in values.items()))
