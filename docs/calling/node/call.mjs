// Calls Pageframe's gateway with nothing but its protos:
//
//   PAGEFRAME_PROTOS=path/to/protos node call.mjs generate|cancel|refuse|expire HOST:PORT [API_KEY]
//
// Prints one JSON object a line: what came, and how it ended.
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";
import { setTimeout as sleep } from "node:timers/promises";

const definition = protoLoader.loadSync("pageframe/v1/gateway_service.proto", {
  includeDirs: [process.env.PAGEFRAME_PROTOS],
  keepCase: true,
  oneofs: true,
  defaults: true,
  enums: String,
  longs: String, // A seed has 64 bits, a JavaScript number only 53.
});
const { GatewayService } = grpc.loadPackageDefinition(definition).pageframe.v1;

// Of google/rpc/status.proto and google/rpc/error_details.proto, what an answer to "why" needs.
const { root } = protobuf.parse(
  `syntax = "proto3"; package google.rpc;
   message Any { string type_url = 1; bytes value = 2; }
   message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
   message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`,
  { keepCase: true },
);
const Status = root.lookupType("google.rpc.Status");
const ErrorInfo = root.lookupType("google.rpc.ErrorInfo");

/** Status, reason and numbers of a failed call; the reason is TRANSPORT if the server sent none. */
export function explain(error) {
  const status = grpc.status[error.code];
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  for (const detail of bytes ? Status.decode(bytes).details : []) {
    if (detail.type_url.endsWith("/google.rpc.ErrorInfo")) {
      const { reason, metadata } = ErrorInfo.decode(detail.value);
      return { status, reason, limits: metadata };
    }
  }
  return { status, reason: "TRANSPORT", limits: {} };
}

export function connect(address) {
  return new GatewayService(address, grpc.credentials.createInsecure(), {
    "grpc.max_receive_message_length": 16 * 1024 * 1024,
    // A gateway that comes back is wanted soon; by default gRPC waits up to two minutes.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 500,
    "grpc.enable_http_proxy": 0, // For addresses of one's own network.
  });
}

export function metadataOf(key) {
  const metadata = new grpc.Metadata();
  if (key) metadata.set("authorization", `Bearer ${key}`);
  // With an OpenTelemetry span at hand: metadata.set("traceparent", "00-…-…-01");
  return metadata;
}

/** Yields the messages of one generation, over as many streams as it takes until the deadline. */
export async function* generate(client, request, metadata, deadline) {
  const tokenIds = [];
  let header;
  let isWhole = false;
  for (let attempt = 0; ; attempt += 1) {
    const asked = { ...request };
    // Another name: the broken stream's request may not be known to be dead yet.
    if (attempt) asked.request_id = `${request.request_id ?? ""}~${attempt}`;
    if (header) {
      asked.sampling = { ...request.sampling, seed: header.seed };
      asked.resume_token_ids = tokenIds;
    }
    const call = client.Generate(asked, metadata, { deadline });
    try {
      for await (const message of call) {
        if (message.header && header) continue;
        header ??= message.header;
        if (message.delta) {
          tokenIds.push(...message.delta.token_ids);
          // The rest of the text comes without tokens; twice, if the stream broke right behind it.
          const isRest = message.delta.token_ids.length === 0;
          if (isRest && isWhole) continue;
          isWhole = isRest;
        }
        yield message;
      }
      return;
    } catch (error) {
      if (error.code !== grpc.status.UNAVAILABLE || Date.now() > deadline) throw error;
      await sleep(200);
    } finally {
      call.cancel(); // Whoever stops reading takes the request back; an ended call does not mind.
    }
  }
}

const REQUEST = {
  token_ids: { ids: [7, 8, 9] },
  sampling: { max_tokens: 150, seed: 1, ignore_eos: true },
};

function print(message) {
  const { header, delta, completion } = message;
  if (header) console.log(JSON.stringify({ request_id: header.request_id, seed: header.seed }));
  if (delta) console.log(JSON.stringify({ token_ids: delta.token_ids, text: delta.text }));
  if (completion) console.log(JSON.stringify({ finish_reason: completion.finish_reason }));
}

const COMMANDS = {
  async generate(client, metadata) {
    const request = { ...REQUEST, request_id: "a-whole-one" };
    const deadline = Date.now() + 60_000;
    for await (const message of generate(client, request, metadata, deadline)) print(message);
  },
  async cancel(client, metadata) {
    const request = { ...REQUEST, request_id: "a-cancelled-one" };
    const deadline = Date.now() + 60_000;
    for await (const message of generate(client, request, metadata, deadline)) {
      if (message.message !== "delta") continue;
      // Another process of the same tenant may do this, too.
      client.Cancel({ request_id: request.request_id }, metadata, { deadline }, () => {});
    }
  },
  async refuse(client, metadata) {
    const request = { ...REQUEST, sampling: { temperature: -1 } };
    for await (const message of generate(client, request, metadata, Date.now() + 60_000)) {
      print(message);
    }
  },
  async expire(client, metadata) {
    const request = { ...REQUEST, sampling: { max_tokens: 3000, ignore_eos: true } };
    for await (const message of generate(client, request, metadata, Date.now() + 500)) {
      print(message);
    }
  },
};

const [command, address, key] = process.argv.slice(2);
const client = connect(address);
try {
  await COMMANDS[command](client, metadataOf(key));
} catch (error) {
  if (error.code === undefined) throw error; // Not from gRPC: a mistake of our own.
  console.log(JSON.stringify(explain(error)));
} finally {
  client.close();
}
