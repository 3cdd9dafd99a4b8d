// A streamed answer over gRPC. The loader reads the .proto files as they are, so there is no code to generate.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const contract = loadSync("lockstep/v1/inference_service.proto", {
  includeDirs: [fileURLToPath(new URL("../../../proto", import.meta.url))],
  // Names as they are in the contract, 64-bit numbers without loss, and fields that are not sent.
  keepCase: true,
  enums: String,
  longs: String,
  oneofs: true,
  defaults: true,
});
const { InferenceService } = grpc.loadPackageDefinition(contract).lockstep.v1;
const client = new InferenceService(
  process.env.LOCKSTEP_GRPC ?? "127.0.0.1:50051",
  grpc.credentials.createInsecure(),
);

const request = {
  conversation: { messages: [{ role: "ROLE_USER", content: [{ text: "What is the capital of France? Answer in one sentence." }] }] },
  sampling: { max_new_tokens: 32 },
};
const call = client.StreamChat(request, { deadline: Date.now() + 60_000 });
let finish;
for await (const response of call) {
  if (response.event === "chunk") process.stdout.write(response.chunk.text);
  if (response.event === "finish") finish = response.finish;
}
if (!finish) throw new Error("the stream was cut off");
console.log(`\n${finish.usage.completion_tokens} tokens, seed ${finish.repro.seed}`);
client.close();
