// The fake NVRTC: g++ compiles the kernels, with the twin of the prelude in place of the one that is given, and the
// "cubin" is a shared object that the fake driver loads.

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

extern char** environ;

namespace {

namespace fs = std::filesystem;

// Names and values are NVIDIA's.
#define NVRTC_RESULTS(X)                       \
    X(NVRTC_SUCCESS, 0)                        \
    X(NVRTC_ERROR_OUT_OF_MEMORY, 1)            \
    X(NVRTC_ERROR_PROGRAM_CREATION_FAILURE, 2) \
    X(NVRTC_ERROR_INVALID_INPUT, 3)            \
    X(NVRTC_ERROR_INVALID_PROGRAM, 4)          \
    X(NVRTC_ERROR_INVALID_OPTION, 5)           \
    X(NVRTC_ERROR_COMPILATION, 6)              \
    X(NVRTC_ERROR_INTERNAL_ERROR, 11)

enum nvrtcResult : int {
#define X(name, value) name = value,
    NVRTC_RESULTS(X)
#undef X
};

struct File {
    std::string name, text;
};

struct Program {
    File source;
    std::vector<File> headers;
    std::string log, image;
};

struct Options {
    std::string architecture = "75";  // as "90" or "90a"
    std::vector<std::string> for_compiler;
};

struct EntryPoint {
    std::string name, max_threads;
};

constexpr const char* PRELUDE = "device.cuh";
constexpr const char* THREADS_MAX = "1024";

// === Options ===

// What NVRTC knows and code for a CPU has no use for; an entry that ends in '=' takes any value.
constexpr std::array IGNORED_OPTIONS = {
    "--std=",
    "-std=",
    "--fmad=",
    "--use_fast_math",
    "--ftz=",
    "--prec-div=",
    "--prec-sqrt=",
    "--maxrregcount=",
    "--generate-line-info",
    "-lineinfo",
    "--device-debug",
    "--extra-device-vectorization",
    "--default-device",
    "-default-device",
    "--device-as-default-execution-space",
    "--ptxas-options=",
    "--restrict",
    "--dopt=",
    "--disable-warnings",
    "-w",
    "--minimal",
    "--split-compile=",
    "--device-int128",
    "--no-cache",
};
constexpr std::array ARCHITECTURES = {"75",  "80",  "86",   "87",  "88",  "89", "90",
                                      "90a", "100", "100a", "103", "120", "121"};

bool starts_with(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

bool is_ignored(const std::string& option) {
    for (const std::string known : IGNORED_OPTIONS) {
        if (option == known || (known.back() == '=' && starts_with(option, known))) return true;
    }
    return false;
}

// False, with the reason in the log, if NVRTC would not take the options.
bool read_options(int n, const char* const* options, Options& read, std::string& log) {
    for (int i = 0; i < n; i++) {
        std::string option = options[i];
        size_t equals = option.find('=');
        std::string name = option.substr(0, equals), value = equals == option.npos ? "" : option.substr(equals + 1);
        if (name == "--gpu-architecture" || name == "-arch") {
            size_t digits = value.find('_') + 1;
            read.architecture = value.substr(digits);
            bool known = false;
            for (const char* architecture : ARCHITECTURES) known |= read.architecture == architecture;
            if (!known || digits == 0) {
                log += "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
                return false;
            }
        } else if (option == "-D" || option == "-I") {
            if (++i == n) return false;
            read.for_compiler.push_back(option + options[i]);
        } else if (starts_with(option, "-D") || starts_with(option, "-I")) {
            read.for_compiler.push_back(option);
        } else if (name == "--define-macro" || name == "--include-path") {
            read.for_compiler.push_back((name == "--define-macro" ? "-D" : "-I") + value);
        } else if (!is_ignored(option)) {
            log += "nvrtc: error: unrecognized option " + option + " found\n";
            return false;
        }
    }
    return true;
}

// === Running g++ ===

std::string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
}

// A folder of our own that goes away with this.
struct Workplace {
    Workplace() {
        std::string pattern = fs::temp_directory_path() / "emulated-nvrtc-XXXXXX";
        if (!mkdtemp(pattern.data())) throw std::system_error(errno, std::generic_category(), pattern);
        path = pattern;
    }
    ~Workplace() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    fs::path path;
};

// Runs g++ in the folder; what it says goes to the log. False if it fails.
bool run_compiler(const fs::path& folder, std::vector<std::string> arguments, std::string& log) {
    const char* compiler = getenv("CXX");
    arguments.insert(arguments.begin(), compiler ? compiler : "g++");
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);

    fs::path messages = folder / "messages";
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addchdir_np(&actions, folder.c_str());
    posix_spawn_file_actions_addopen(&actions, 2, messages.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    pid_t child;
    int error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error) {
        log += std::string("emulator: ") + argv[0] + ": " + strerror(error) + "\n";
        return false;
    }
    int status = -1;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    log += read_file(messages);
    return status == 0;
}

// === Compiling ===

// The folder of this library, where the twin of the prelude lies.
fs::path own_folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(own_folder), &info);
    return fs::canonical(info.dli_fname).parent_path();
}

// Past the parenthesis that closes the one at `open`, and the first argument in between.
size_t skip_arguments(const std::string& text, size_t open, std::string& first) {
    size_t depth = 0, first_end = text.npos, at = open;
    do {
        if (text[at] == '(') depth++;
        if (text[at] == ')') depth--;
        if (first_end == text.npos && (depth == 0 || (depth == 1 && text[at] == ','))) first_end = at;
    } while (++at < text.size() && depth > 0);
    first = text.substr(open + 1, first_end - open - 1);
    return at;
}

// Finds the entry points in preprocessed source, and blanks out the words that g++ does not know: `__global__`, then
// `void` and `__launch_bounds__(...)` in either order, then the name.
std::vector<EntryPoint> take_entry_points(std::string& source) {
    const std::string global = "__global__", bounds = "__launch_bounds__";
    std::vector<EntryPoint> found;
    for (size_t at; (at = source.find(global)) != source.npos;) {
        source.replace(at, global.size(), global.size(), ' ');
        EntryPoint entry_point = {"", THREADS_MAX};
        while (entry_point.name.empty()) {
            at = source.find_first_not_of(" \t\n", at);
            size_t end = at;
            while (end < source.size() && (isalnum(source[end]) || source[end] == '_')) end++;
            std::string word = source.substr(at, end - at);
            if (word == bounds) {
                end = skip_arguments(source, source.find('(', end), entry_point.max_threads);
                for (size_t i = at; i < end; i++) source[i] = source[i] == '\n' ? '\n' : ' ';
            } else if (word != "void") {
                entry_point.name = word.empty() ? "?" : word;  // g++ will say what is wrong with it
            }
            at = end;
        }
        found.push_back(entry_point);
    }
    return found;
}

// The table that the driver looks for.
std::string module_table(const std::vector<EntryPoint>& entry_points, const std::string& architecture) {
    std::ostringstream text;
    text << "\n# 1 \"emulator\"\nstatic const emulator::Kernel emulator_kernels[] = {\n";
    for (const auto& [name, max_threads] : entry_points) {
        text << "    emulator::describe<decltype(" << name << "), " << name << ">";
        text << "(\"" << name << "\", " << max_threads << "),\n";
    }
    text << "    {}};\n"
         << "extern \"C\" const emulator::Module emulator_module = {\"" << EMULATOR_VERSION << "\", \"" << architecture
         << "\", emulator_kernels, " << entry_points.size() << ", emulator::shared_memory, &emulator::runtime};\n";
    return text.str();
}

// `sm_90a` is __CUDA_ARCH__ 900.
std::vector<std::string> predefined(const std::string& architecture) {
    std::string number = architecture.back() == 'a' ? architecture.substr(0, architecture.size() - 1) : architecture;
    return {"-D__CUDACC__", "-D__CUDACC_RTC__", "-D__CUDA_ARCH__=" + number + "0"};
}

nvrtcResult compile(Program& program, const Options& options) {
    Workplace workplace;
    const fs::path& folder = workplace.path;
    // Messages name the source as the caller does, which need not be a name to write to.
    write_file(folder / "source.cu", "#line 1 \"" + program.source.name + "\"\n" + program.source.text);
    for (const auto& header : program.headers) {
        if (header.name != PRELUDE) write_file(folder / fs::path(header.name).relative_path(), header.text);
    }

    std::vector<std::string> preprocess = {"-std=c++17", "-E", "-x", "c++", "-I", own_folder(), "-o", "kernels.ii"};
    for (auto& option : predefined(options.architecture)) preprocess.push_back(option);
    preprocess.insert(preprocess.end(), options.for_compiler.begin(), options.for_compiler.end());
    // Before the source itself, as NVRTC's built-in declarations are.
    preprocess.insert(preprocess.end(), {"-include", PRELUDE, "source.cu"});
    if (!run_compiler(folder, preprocess, program.log)) return NVRTC_ERROR_COMPILATION;

    std::string source = read_file(folder / "kernels.ii");
    auto entry_points = take_entry_points(source);
    write_file(folder / "kernels.ii", source + module_table(entry_points, options.architecture));
    const std::vector<std::string> build = {
        "-std=c++17", "-O2", "-march=x86-64-v3", "-fPIC", "-shared", "-o", "kernels.so",
        // Products and sums fuse where a kernel says so, and nowhere else.
        "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
        // What is uninitialized has a definite, strange value.
        "-ftrivial-auto-var-init=pattern",
        // A GPU faults on what is misaligned, too; the others it only gets wrong.
        "-fsanitize=alignment,bounds,shift-exponent", "-fsanitize-undefined-trap-on-error",
        // Locals that a fibre's stack cannot hold meet its guard page.
        "-fstack-clash-protection",
        // Two variants of one source have functions of the same names: each calls its own.
        "-fno-gnu-unique", "-Wl,-Bsymbolic",
        // Reports of faults name the line.
        "-g1", "-fno-optimize-sibling-calls", "-fno-exceptions", "-fno-rtti", "-w", "kernels.ii", "-lm"};
    if (!run_compiler(folder, build, program.log)) return NVRTC_ERROR_COMPILATION;
    program.image = read_file(folder / "kernels.so");
    return NVRTC_SUCCESS;
}

nvrtcResult copy_out(const std::string& from, char* to) {
    memcpy(to, from.data(), from.size());
    return NVRTC_SUCCESS;
}

}  // namespace

API const char* nvrtcGetErrorString(nvrtcResult result) {
    switch (result) {
#define X(name, value) \
    case name: return #name;
        NVRTC_RESULTS(X)
#undef X
    }
    return "NVRTC_ERROR unknown";
}

// The minor version tells one emulator from another, so that what was compiled by one is not looked for by another.
API nvrtcResult nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor =
        1000 + static_cast<int>(strtoul(std::string(EMULATOR_VERSION).substr(0, 7).c_str(), nullptr, 16) % 1'000'000);
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcGetNumSupportedArchs(int* n) {
    *n = 0;
    for (const char* architecture : ARCHITECTURES) *n += !strchr(architecture, 'a');
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcGetSupportedArchs(int* architectures) {
    for (const char* architecture : ARCHITECTURES) {
        if (!strchr(architecture, 'a')) *architectures++ = atoi(architecture);
    }
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcCreateProgram(Program** program, const char* source, const char* name, int n_headers,
                                   const char* const* headers, const char* const* header_names) {
    *program = new Program{{name && *name ? name : "default_program", source}, {}, {}, {}};
    for (int i = 0; i < n_headers; i++) (*program)->headers.push_back({header_names[i], headers[i]});
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcCompileProgram(Program* program, int n_options, const char* const* options) {
    Options read;
    if (!read_options(n_options, options, read, program->log)) return NVRTC_ERROR_INVALID_OPTION;
    try {
        return compile(*program, read);
    } catch (const std::exception& error) {
        program->log += std::string("emulator: ") + error.what() + "\n";
        return NVRTC_ERROR_INTERNAL_ERROR;
    }
}

// The size counts the log's terminating zero.
API nvrtcResult nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    *bytes = program->log.size() + 1;
    return NVRTC_SUCCESS;
}
API nvrtcResult nvrtcGetProgramLog(Program* program, char* log) {
    log[program->log.size()] = 0;
    return copy_out(program->log, log);
}

API nvrtcResult nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    *bytes = program->image.size();
    return NVRTC_SUCCESS;
}
API nvrtcResult nvrtcGetCUBIN(Program* program, char* image) { return copy_out(program->image, image); }

// There is no PTX; the shared object does for whoever asks.
API nvrtcResult nvrtcGetPTXSize(Program* program, size_t* bytes) { return nvrtcGetCUBINSize(program, bytes); }
API nvrtcResult nvrtcGetPTX(Program* program, char* image) { return nvrtcGetCUBIN(program, image); }
