/* Memory bandwidth with the four kernels of STREAM: the yardstick for `counterpoint calibrate`.
 *
 *   stream ELEMENTS ROUNDS      prints "copy scale add triad" as best bytes per second, counted as STREAM does
 *
 * float64; first touch by the threads that compute; the first round is not counted; the result is checked.
 */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: stream ELEMENTS ROUNDS\n");
        return 2;
    }
    const long n = atol(argv[1]), rounds = atol(argv[2]);
    const double q = 3.0, words[4] = {2, 2, 3, 3};
    double best[4] = {1e30, 1e30, 1e30, 1e30};
    double *restrict a = aligned_alloc(64, n * 8), *restrict b = aligned_alloc(64, n * 8),
           *restrict c = aligned_alloc(64, n * 8);
    if (n < 8 || rounds < 1 || !a || !b || !c) {
        fprintf(stderr, "stream: no memory for %ld elements\n", n);
        return 1;
    }
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        a[i] = 1.0;
        b[i] = 2.0;
        c[i] = 0.0;
    }
    for (long round = 0; round <= rounds; round++) {
        double t[5];
        t[0] = omp_get_wtime();
#pragma omp parallel for schedule(static)
        for (long i = 0; i < n; i++) c[i] = a[i];
        t[1] = omp_get_wtime();
#pragma omp parallel for schedule(static)
        for (long i = 0; i < n; i++) b[i] = q * c[i];
        t[2] = omp_get_wtime();
#pragma omp parallel for schedule(static)
        for (long i = 0; i < n; i++) c[i] = a[i] + b[i];
        t[3] = omp_get_wtime();
#pragma omp parallel for schedule(static)
        for (long i = 0; i < n; i++) a[i] = b[i] + q * c[i];
        t[4] = omp_get_wtime();
        for (int k = 0; round && k < 4; k++)
            if (t[k + 1] - t[k] < best[k]) best[k] = t[k + 1] - t[k];
    }
    double x = 1.0, y = 2.0, z = 0.0, error = 0.0;
    for (long round = 0; round <= rounds; round++) {
        z = x;
        y = q * z;
        z = x + y;
        x = y + q * z;
    }
    for (long i = 0; i < n; i++) error += fabs(a[i] - x) / x + fabs(b[i] - y) / y + fabs(c[i] - z) / z;
    if (!(error / n < 1e-13)) {
        fprintf(stderr, "stream: wrong result, mean error %g\n", error / n);
        return 1;
    }
    for (int k = 0; k < 4; k++) printf("%.6e%c", words[k] * 8 * n / best[k], k < 3 ? ' ' : '\n');
    return 0;
}
