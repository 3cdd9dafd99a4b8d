// A streamed answer over gRPC: `buf generate && go mod tidy && go run .`
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	lockstep "lockstep.example/chat/gen/lockstep/v1"
)

func main() {
	target := os.Getenv("LOCKSTEP_GRPC")
	if target == "" {
		target = "127.0.0.1:50051"
	}
	if err := chat(target, "What is the capital of France? Answer in one sentence."); err != nil {
		for _, detail := range status.Convert(err).Details() {
			if info, ok := detail.(*errdetails.ErrorInfo); ok {
				log.Fatalf("%s: %v", info.Reason, err)
			}
		}
		log.Fatal(err)
	}
}

func chat(target, question string) error {
	connection, err := grpc.Dial(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	// The deadline travels to the engine; cancelling frees the request's place there.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := lockstep.NewInferenceServiceClient(connection).StreamChat(ctx, &lockstep.StreamChatRequest{
		Conversation: &lockstep.Conversation{Messages: []*lockstep.Message{{
			Role:    lockstep.Role_ROLE_USER,
			Content: []*lockstep.ContentPart{{Part: &lockstep.ContentPart_Text{Text: question}}},
		}}},
		Sampling: &lockstep.SamplingParams{MaxNewTokens: proto.Uint32(32)},
	})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("the stream was cut off")
		}
		if err != nil {
			return err
		}
		fmt.Print(response.GetChunk().GetText())
		if finish := response.GetFinish(); finish != nil {
			fmt.Printf("\n%d tokens, seed %d\n", finish.Usage.CompletionTokens, finish.Repro.Seed)
			return nil
		}
	}
}
