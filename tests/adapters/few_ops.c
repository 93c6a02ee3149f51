/* A few operations in plain C, through the kit's files, without any library:
 *     python -m npformer.testing --dump DIR --level op
 *     cc few_ops.c -lm -o few_ops && for f in DIR/cases/op.gelu-*; do ./few_ops gelu $f DIR/answers/$(basename $f); done
 *     python -m npformer.testing --check DIR
 * safetensors: 8 bytes length, a JSON header {name: {dtype, shape, data_offsets}}, then the numbers.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char shape[128]; /* as it is printed in the header: nothing here needs it as numbers */
    size_t n;
    double *data;
} Tensor;

static char *file;
static uint64_t header_length;

static void read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) { perror(path); exit(1); }
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    file = calloc(size + 1, 1);
    if (fread(file, 1, size, f) != (size_t)size) { perror(path); exit(1); }
    fclose(f);
    memcpy(&header_length, file, 8);
}

/* The tensor called `name`: the header is searched for it as text. */
static Tensor get(const char *name) {
    Tensor t;
    char key[64];
    size_t from, to;
    snprintf(key, sizeof key, "\"%s\":{", name);
    char *entry = strstr(file + 8, key);
    if (!entry) { fprintf(stderr, "no %s\n", name); exit(1); }
    sscanf(strstr(entry, "\"shape\":") + 8, "%127[^]]", t.shape);
    strcat(t.shape, "]");
    sscanf(strstr(entry, "\"data_offsets\":") + 15, "[%zu,%zu]", &from, &to);
    t.n = (to - from) / sizeof(double);
    t.data = (double *)malloc(to - from + 1);
    memcpy(t.data, file + 8 + header_length + from, to - from);
    return t;
}

static void write_file(const char *path, int n, const char **names, Tensor *tensors) {
    char header[4096] = "{";
    size_t offset = 0;
    for (int i = 0; i < n; i++) {
        size_t bytes = tensors[i].n * sizeof(double);
        sprintf(header + strlen(header), "%s\"%s\":{\"dtype\":\"F64\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                i ? "," : "", names[i], tensors[i].shape, offset, offset + bytes);
        offset += bytes;
    }
    strcat(header, "}");
    uint64_t length = strlen(header);
    FILE *f = fopen(path, "wb");
    if (!f) { perror(path); exit(1); }
    fwrite(&length, 8, 1, f);
    fwrite(header, 1, length, f);
    for (int i = 0; i < n; i++) fwrite(tensors[i].data, sizeof(double), tensors[i].n, f);
    fclose(f);
}

int main(int argc, char **argv) {
    if (argc != 4) { fprintf(stderr, "usage: few_ops relu|gelu CASE ANSWER\n"); return 2; }
    read_file(argv[2]);
    Tensor x = get("x"), dy = get("dy"), y = get("x"), dx = get("x");
    int is_gelu = !strcmp(argv[1], "gelu");
    for (size_t i = 0; i < x.n; i++) {
        double v = x.data[i];
        double gate = is_gelu ? 0.5 * (1 + erf(v * sqrt(0.5))) : v > 0;
        double slope = is_gelu ? v * exp(-0.5 * v * v) / sqrt(2 * acos(-1)) : 0;
        y.data[i] = v * gate;
        dx.data[i] = dy.data[i] * (gate + slope);
    }
    write_file(argv[3], 2, (const char *[]){"y", "d.x"}, (Tensor[]){y, dx});
    return 0;
}
